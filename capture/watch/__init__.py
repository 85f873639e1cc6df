"""`looptap.watch` measures what `looptap.capture` does, in any torch.nn.Module as it is."""
