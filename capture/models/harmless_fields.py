"""Fields of config.json that change no forward pass, whatever they hold.

What a family's reading does not read and what is not here is refused: a field may make another model of the
same tensors, as `is_causal` does.
"""

COMMON = frozenset(
    (
    # what a model was made and saved with, and how its outputs are handed over
    "_name_or_path", "_commit_hash", "_attn_implementation", "_attn_implementation_autoset",
    "attn_implementation", "transformers_version", "transformers.js_config", "transformers_weights",
    "torch_dtype", "dtype", "torchscript", "use_bfloat16", "return_dict", "output_attentions",
    "output_hidden_states", "use_cache", "is_decoder", "chunk_size_feed_forward", "initializer_range",
    "pretraining_tp", "attention_dropout", "hidden_dropout", "unsloth_version", "unsloth_fixed",
    "is_llama_config", "max_sequence_length",
    # heads for other tasks, whose tensors are refused
    "id2label", "label2id", "num_labels", "problem_type", "finetuning_task", "task_specific_params",
    # text and its generation
    "tokenizer_class", "prefix", "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id",
    "unk_token_id", "cls_token_id", "decoder_start_token_id", "max_length", "max_new_tokens",
    "min_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups", "diversity_penalty",
    "temperature", "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty",
    "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences",
    "output_scores", "return_dict_in_generate", "forced_bos_token_id", "forced_eos_token_id",
    "remove_invalid_values", "exponential_decay_length_penalty", "suppress_tokens",
    "begin_suppress_tokens",
    )
)  # fmt: skip
QWEN = frozenset(["max_window_layers"])  # of sliding windows, which are refused
OURO = QWEN | {"early_exit_threshold"}  # a capture runs every recurrence
RAVEN = frozenset(
    (
    "activation_checkpoint_impl", "architecture_class_name", "effective_expected_depth",
    "init_orthogonal", "init_strategy", "init_values.out_proj", "init_values.embedding",
    "init_values.embed_scale", "mean_backprop_depth", "n_layers", "padding_multiple", "sampling_scheme",
    "test_time_noise_type", "vocab_size", "block_size", "rope_base",
    )
)  # fmt: skip
"""Read by no wiring's code in a forward pass, or by one of them, as here, and not by the others."""
