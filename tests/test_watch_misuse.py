"""Calls that `watch` would mistake, and modules that are copied, retried or called elsewhere."""

import copy
import io
import threading
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

import looptap
from looptap.errors import StoreExistsError, WatchError
from looptap.tests.watched_modules import HandBlock, make_looped, sequence_values

IDS = torch.arange(12).view(2, 6)
RIGHT = torch.tensor([[1] * 6, [1, 1, 1, 1, 0, 0]])


class Stack(nn.Module):
    """Embedding and blocks; `before` and `after` change the axes of the residual."""

    def __init__(self, blocks=2, before=lambda x: x, after=lambda x: x):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(50, 16)
        self.layers = nn.ModuleList(HandBlock() for _ in range(blocks))
        self.before, self.after = before, after

    def forward(self, ids, pad=None, labels=None, **more):
        x = self.before(self.embedding(ids))
        for block in self.layers:
            x = block(x)
        return self.after(x)


def refuse(module, run, message, blocks=None, **settings):
    with (
        torch.no_grad(),
        looptap.watch(module, blocks, **settings) as watched,
        pytest.raises(WatchError, match=message),
    ):
        run()
    assert watched.num_sequences == 0


def lengths(watched):
    found = watched.dataset()["sequence_length"].values
    return found[found > 0].tolist()


# --- padding under another name, axes in another order, ids


@pytest.mark.parametrize(
    ("args", "kwargs", "name"),
    [
        ((IDS, RIGHT.bool()), {}, "pad"),
        ((IDS,), {"src_key_padding_mask": RIGHT == 0}, "src_key_padding_mask"),
        ((IDS,), {"mask": RIGHT.float()}, "mask"),
        ((IDS,), {"pad": torch.zeros(2, 6).masked_fill(RIGHT == 0, -torch.inf)}, "pad"),
        ((IDS,), {"batch": {"attention_mask": RIGHT}}, "attention_mask"),
    ],
)
@pytest.mark.parametrize("quantities", ["residual", "attention"])
def test_padding_under_another_name(args, kwargs, name, quantities):
    module = Stack()
    message = rf"was given {name} \[2, 6\], which may say .* watched\.set_mask"
    refuse(module, lambda: module(*args, **kwargs), message, quantities=quantities)
    with torch.no_grad(), looptap.watch(module, quantities=quantities) as watched:
        watched.set_mask(RIGHT)
        module(*args, **kwargs)
    assert lengths(watched) == [6, 4]


def test_padding_by_place_behind_star_arguments():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Stack()

        def forward(self, *args):
            return self.inner(*args)

    module = Outer()
    refuse(module, lambda: module(IDS, RIGHT), "was given an argument .* watched.set_mask", "inner.layers.*")
    with torch.no_grad(), looptap.watch(module, "inner.layers.*") as watched:
        module(IDS % 2)  # ids of two values are no mask
    assert sequence_values(watched.dataset(), "token_id", 0).tolist() == [0, 1] * 3


def test_arguments_that_are_no_padding():
    """Arguments of one value, of another shape, an encoder's, or of another name."""
    module, binary = Stack(), IDS % 2
    fine = {"mask": torch.ones(2, 6), "pad": RIGHT[:, :5], "encoder_attention_mask": RIGHT, "types": RIGHT}
    with torch.no_grad(), looptap.watch(module) as watched:
        for name, value in fine.items():
            module(IDS, **{name: value})
        module(binary)
    assert lengths(watched) == [6] * 10


@pytest.mark.parametrize("quantities", ["residual", "attention"])
@pytest.mark.parametrize("axes", ["sequence first", "flattened"])
def test_residuals_with_other_axes(axes, quantities):
    change = (lambda x: x.transpose(0, 1)) if axes == "sequence first" else (lambda x: x.flatten(0, 1))
    module = Stack(before=change)
    message = (
        rf"{axes}: (6 and 2 where the ids have 2|12 where the ids have 2) rows of 6.*run one row at a time"
    )
    refuse(module, lambda: module(IDS), message, quantities=quantities)


def test_attention_with_other_axes_than_the_residual():
    """No ids tell; the message does not advise to leave attention out, for that would be wrong."""

    class Turned(HandBlock):
        def forward(self, x):
            return super().forward(x.transpose(0, 1)).transpose(0, 1)

    class Flat(HandBlock):
        def forward(self, x):
            return super().forward(x.unflatten(0, (2, 6))).flatten(0, 1)

    for kind, shape, message in ((Turned, (6, 2, 16), "sequence first"), (Flat, (12, 16), "flattened")):
        module = nn.Sequential(kind(), kind())
        refuse(
            module, partial(module, torch.randn(shape)), rf"block 0: .*query .*{message}.*cannot be watched$"
        )


def test_torchs_own_layers_are_sequence_first():
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(16, 2, 32), 2, enable_nested_tensor=False
    ).eval()
    x = torch.randn(6, 2, 16)
    refuse(encoder, lambda: encoder(x), r"layers\.0 has batch_first=False", quantities="residual")
    with torch.no_grad(), looptap.watch(encoder, quantities="residual") as watched:
        encoder(x[:, 0])
    assert lengths(watched) == [6]


def test_ids_are_the_first_by_signature():
    class Module(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Stack()

        def forward(self, tokens, others):
            return self.inner(tokens)

    module = Module()
    with torch.no_grad(), looptap.watch(module, "inner.layers.*") as watched:
        module(others=IDS + 1, tokens=IDS)
    assert sequence_values(watched.dataset(), "token_id", 1).tolist() == IDS[1].tolist()
    huge = IDS + 2**31
    with (
        looptap.watch(module, "inner.layers.*"),
        pytest.raises(WatchError, match="from 2147483648 to 2147483659"),
    ):
        module(huge, IDS)


@pytest.mark.parametrize("quantities", ["residual", "attention"])
def test_empty_batches_are_not_recorded(quantities):
    module = Stack()
    with torch.no_grad(), looptap.watch(module, quantities=quantities) as watched:
        for empty in (IDS[:0], IDS[:, :0]):
            assert module(empty).shape == (*empty.shape, 16)
        module(IDS)
        module(IDS[:, :0])
    assert watched.num_sequences == 2 and lengths(watched) == [6, 6]


# --- blocks


class Parts(nn.Module):
    """Prelude, core, coda, where the core is no list."""

    def __init__(self):
        super().__init__()
        self.embedding, self.core = nn.Embedding(50, 16), HandBlock()
        self.prelude, self.coda = nn.ModuleList([HandBlock()]), nn.ModuleList([HandBlock()])

    def forward(self, ids):
        x = self.prelude[0](self.embedding(ids))
        for _ in range(3):
            x = self.core(x)
        return self.coda[0](x)


def test_a_core_that_is_no_list():
    module = Parts()
    message = r"Parts has HandBlock outside of its lists of them, core: .*prelude\.\* \(1 HandBlock\), coda"
    with pytest.raises(WatchError, match=message):
        looptap.watch(module).__enter__()
    with torch.no_grad(), looptap.watch(module, ["prelude", "core", "coda"]) as watched:
        module(IDS)
    assert watched.notation == "(1,1x3,1)"


def test_two_towers_are_not_one_list():
    module = nn.ModuleDict({"text": Stack(), "image": Stack()})
    message = r"several lists of blocks: .*text\.layers\.\* \(2 HandBlock\), image\.layers"
    with pytest.raises(WatchError, match=message):
        looptap.watch(module).__enter__()


class Nested(nn.Module):
    def __init__(self, kind):
        super().__init__()
        groups = [nn.ModuleList(HandBlock() for _ in range(2)) for _ in range(2)]
        self.embedding = nn.Embedding(50, 16)
        self.groups = nn.ModuleDict(dict(zip("ab", groups, strict=True))) if kind == "dict" else kind(groups)

    def forward(self, ids):
        x = self.embedding(ids)
        for group in self.groups.values() if isinstance(self.groups, nn.ModuleDict) else self.groups:
            for block in group:
                x = block(x)
        return x


@pytest.mark.parametrize("kind", [nn.ModuleList, "dict"])
@pytest.mark.parametrize(
    "blocks",
    ["groups", "groups.*", "groups.*.*", lambda m: m.groups, lambda m: list(m.groups.children()), None],
)
def test_lists_in_lists(kind, blocks):
    module = Nested(kind)
    given = blocks(module) if callable(blocks) else blocks
    if kind == "dict" and blocks is None:
        given = "groups"
    with torch.no_grad(), looptap.watch(module, given) as watched:
        module(IDS)
    assert watched.notation == "(4,0,0)"


@pytest.mark.parametrize("blocks", ["*", None])
def test_a_sequential_is_watched(blocks):
    module = nn.Sequential(HandBlock(), HandBlock())
    module[0].experts = nn.ModuleList(
        [nn.Sequential(nn.Linear(2, 2))]
    )  # a list inside a block is none of ours
    with torch.no_grad(), looptap.watch(module, blocks) as watched:
        module(torch.randn(2, 5, 16))
    assert watched.notation == "(2,0,0)"
    with pytest.raises(WatchError, match="a str was given as module"):
        looptap.watch("model").__enter__()  # pyright: ignore


# --- copies, threads, retries


def test_copies_made_inside_are_not_watched():
    module = make_looped()
    for block in module.blocks:
        block.attend = CAUSAL  # instead of a local function, which nothing can pickle
    with torch.no_grad():
        plain = module(IDS)
        with looptap.watch(module) as watched:
            module(IDS)
            copied = copy.deepcopy(module)
            copy.copy(module.core[0])(torch.randn(1, 3, 16))  # shares its hooks, as replicas do
            file = io.BytesIO()
            torch.save(module, file)
            assert torch.equal(copied(IDS), plain)
            assert len(file.getvalue()) < 200_000
        file.seek(0)
        loaded = torch.load(file, weights_only=False)
        for other in (copied, loaded, module):
            assert torch.equal(other(IDS), plain)
            with looptap.watch(other) as again:
                other(IDS)
            assert again.num_sequences == 2
    assert watched.num_sequences == 2


CAUSAL = partial(nn.functional.scaled_dot_product_attention, is_causal=True)


@pytest.mark.slow
def test_another_thread():
    """It is refused, and the pass that is at work in the first one goes on."""
    module, errors = make_looped(), []

    def run():
        for part in (partial(module, IDS), partial(module.core[0], torch.randn(1, 3, 16))):
            try:
                part()
            except Exception as error:
                errors.append(error)

    def in_a_thread():
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()

    with torch.no_grad(), looptap.watch(module) as alone:
        module(IDS)
    places = (module.core[0].q, module.adapter, module.head)  # in a block, between blocks, after them
    for place in places:
        waiting = [in_a_thread]  # once only, or the thread's calls would start threads
        handle = place.register_forward_pre_hook(lambda *_, due=waiting: due.pop()() if due else None)
        with torch.no_grad(), looptap.watch(module) as watched:
            module(IDS)
        handle.remove()
        assert watched.num_sequences == 2
        for name in ("residual_norm", "attention_received", "gap_norm"):
            np.testing.assert_array_equal(watched.dataset()[name], alone.dataset()[name])
    assert len(errors) == 2 * len(places)
    for error in errors:
        assert isinstance(error, WatchError)
        assert "called by another thread than the one that watches" in str(error)


class Retried(nn.Module):
    """Calls a block again when it raised."""

    def __init__(self, blocks):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x):
        for block in self.blocks:
            try:
                x = block(x)
            except (RuntimeError, ValueError):
                x = block(x)
        return x


def failing_once(error, after):
    """Raises the first time: from a block's first linear map, or from one after its attention."""
    block, failed = HandBlock(), []

    def hook(*_):
        if not failed:
            failed.append(1)
            raise error

    (block.down if after else block.q).register_forward_pre_hook(hook)
    return block, failed


@pytest.mark.parametrize("after", [False, True])
def test_a_block_that_is_called_again(after):
    torch.manual_seed(0)
    block, failed = failing_once(RuntimeError("again"), after)
    module, x = Retried([HandBlock(), block, HandBlock()]), torch.randn(2, 5, 16)
    found = []
    for _ in range(2):
        with torch.no_grad(), looptap.watch(module) as watched:
            module(x)
        assert failed and watched.notation == "(3,0,0)"
        found.append(watched.dataset())
    for name in found[0].data_vars:
        np.testing.assert_array_equal(found[0][name], found[1][name])


def test_a_refusal_that_the_module_caught():
    """The pass is not recorded, and says why when it ends."""
    module = Retried([HandBlock()])
    calls = []

    def attend(q, k, v):
        calls.append(1)
        return nn.functional.scaled_dot_product_attention(q, k, v, dropout_p=0.5 if len(calls) == 1 else 0.0)

    module.blocks[0].attend = attend
    refuse(module, lambda: module(torch.randn(2, 5, 16)), r"block blocks\.0: .*dropout_p=0\.5", "blocks.*")
    assert len(calls) == 2


# --- saving


def test_tensors_without_bytes_are_saved_by_name(tmp_path, monkeypatch):
    module = Stack()
    module.register_buffer("away", torch.empty(3, device="meta"))
    module.register_buffer("sparse", torch.eye(3).to_sparse())
    module.register_buffer("conjugated", torch.randn(3, dtype=torch.complex64).conj())
    with torch.no_grad(), looptap.watch(module) as watched:
        module(IDS)
    found = watched.dataset().attrs["plan"]["model"]["weights_sha256"]
    counted = []
    monkeypatch.setattr(module, "state_dict", lambda: counted.append(1))  # weights are hashed once
    watched.save(tmp_path / "run.zarr")
    assert not counted
    assert looptap.open(tmp_path / "run.zarr").attrs["plan"]["model"]["weights_sha256"] == found
    with pytest.raises(StoreExistsError, match="watching makes a new one, so choose another path"):
        watched.save(tmp_path / "run.zarr")
    lazy = nn.Sequential(HandBlock(), nn.LazyLinear(3))
    with pytest.raises(WatchError, match="not made yet"):
        looptap.watch(lazy, "0").__enter__()


def test_the_path_is_looked_at_on_entering(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(StoreExistsError, match=r"is not a looptap store, it holds notes\.txt"):
        looptap.watch(Stack(), store=tmp_path).__enter__()


def test_what_was_handled_is_let_go():
    module = Stack()
    with looptap.watch(module) as watched:
        try:
            raise RuntimeError
        except RuntimeError:
            module(IDS)
    assert watched._recorder._handled is None and watched._recorder._before is None


def test_public_names():
    assert looptap.WatchError is WatchError
    assert {"WatchError", "capture", "load_model", "open", "watch", "__version__"} <= {*dir(looptap)}
