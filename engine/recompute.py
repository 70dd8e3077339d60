"""Activation recompute: a block keeps its inputs instead of its activations, and runs again when backward needs them.

`recompute_blocks` puts a `Recomputed` in front of each block's forward and leaves all else alone: the module stays the
same object with the same names and parameters, and hooks of the block run once, around it. There is one mechanism for
all policies: in forward each tensor that autograd saves is replaced by a `Place`; the first place that backward looks
into runs the forward again, which fills all of them. Non-reentrant only; a model's own `torch.utils.checkpoint` may lie
inside or around.

    policy      kept between forward and backward
    full        inputs; with `every` = k those of each k-th block, if each block takes what the one before it returned
    selective   inputs, results of matrix products, convolutions and attention
    attention   all but what the core of attention makes (scores, softmax, dropout), which alone runs again: what
                Korthikanti et al. 2022, section 5, call selective
    budget      inputs, and the results that are worth most under a number of bytes (collectives/recompute.py)
"""

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import update_wrapper
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

from ..collectives.recompute import BlockActivations, Choice, cheapest, segment_length
from .activation_section import ActivationSection
from .communicator import Communicator, SoloCommunicator
from .device import random_states, set_random_states
from .keeping import Capture, Keeping, bytes_of, capturing, is_input, keep_chosen, keep_costly, keep_nothing
from .observer import SILENT, Observer
from .shelf import Copy, Reference, Shelf

Visit = Callable[[nn.Module], AbstractContextManager[None]]
"""Has a module's parameters here while it is computed again."""

Forward = Callable[..., Any]


def _nothing_to_bring(module: nn.Module) -> AbstractContextManager[None]:
    return nullcontext()


def recompute_blocks(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    section: ActivationSection,
    device: torch.device,
    *,
    visit: Visit = _nothing_to_bring,
    group: Communicator | None = None,
    observer: Observer = SILENT,
) -> "Recompute | None":
    """Compute the activations of `blocks` again in backward, as `section` says; with policy "none" do nothing.

    Args:
        model: that the blocks are in; its lists of blocks tell which ones follow each other.
        device: of the activations.
        visit: see Visit; for sharded parameters.
        group: the tensor-parallel ranks among which saved inputs may be divided.

    Raises:
        ValueError: there are no blocks, or the device cannot do what the section says.
    """
    if section.policy == "none":
        return None
    if not blocks:
        raise ValueError(
            f"activation_checkpointing.policy = {section.policy!r}, but the model has no repeated blocks; allowed:"
            " none, or units=[...] with the modules"
        )
    if section.policy == "attention":
        blocks = cores_of(blocks)
    recompute = Recompute(model, blocks, section, device, visit, group or SoloCommunicator("tensor"), observer)
    for block in blocks:
        block.forward = Recomputed(recompute, block)
    return recompute


CORE = "core_attention"
"""Name of the module in a block that policy "attention" computes again; Megatron-LM calls it so."""


def cores_of(blocks: Sequence[nn.Module]) -> list[nn.Module]:
    """The modules in blocks that are called CORE.

    Raises:
        ValueError: there are none.
    """
    cores = [module for block in blocks for name, module in block.named_modules() if name.rpartition(".")[2] == CORE]
    if not cores:
        raise ValueError(
            f"activation_checkpointing.policy = 'attention', but no module in a {type(blocks[0]).__name__} is called"
            f" {CORE!r}; allowed: policy 'full', 'selective' or 'budget', or a model whose attention calls one"
        )
    return cores


class Recompute:
    """What the blocks of one model share.

    Attributes:
        every: blocks in a segment.
        shelf: where inputs rest.
        descriptions, choices: by kind of block and shapes of its inputs, for the policy "budget".
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[nn.Module],
        section: ActivationSection,
        device: torch.device,
        visit: Visit,
        group: Communicator,
        observer: Observer,
    ) -> None:
        self.section, self.device, self.visit = section, device, visit
        self.blocks = len(blocks)
        self.every = segment_length(section.every, self.blocks)
        self._follows = _predecessors(model, blocks, self.every)
        slots = section.number_checkpoints or -(-self.blocks // self.every)
        self.shelf = Shelf(
            device,
            host=section.cpu_checkpointing,
            slots=slots if section.contiguous_memory_optimization else None,
            group=group if section.partition_activations else SoloCommunicator("tensor"),
            observer=observer,
        )
        self.descriptions: dict[Any, BlockActivations] = {}
        self.choices: dict[Any, Choice] = {}
        self._open: Callable[[], Region | None] = lambda: None

    def run(self, module: nn.Module, forward: Forward, arguments: tuple, keywords: dict[str, Any]) -> Any:
        """The forward of a block, whose activations are given up."""
        if not torch.is_grad_enabled():
            return forward(*arguments, **keywords)
        if self.section.policy == "budget":
            return self._run_under_budget(module, forward, arguments, keywords)
        before = self._follows.get(module)
        region = self._open()
        if before is None or region is None or region.calls[-1].module is not before:
            keeping = keep_costly() if self.section.policy == "selective" else keep_nothing()
            region = Region(self.device, self.shelf, self.visit, keeping)
        elif not region.returned(arguments, keywords):
            raise ValueError(
                f"activation_checkpointing.every = {self.section.every!r}: a {type(module).__name__} does not take what"
                " the block before it returned, so they cannot be computed again together; allowed for this model: 1"
            )
        self._open = weakref.ref(region)  # autograd's graph holds it
        return region.run(module, forward, arguments, keywords)

    def _run_under_budget(self, module: nn.Module, forward: Forward, arguments: tuple, keywords: dict[str, Any]) -> Any:
        leaves = [leaf for leaf in tree_leaves((arguments, keywords)) if isinstance(leaf, Tensor)]
        kind = (type(module), tuple((leaf.shape, leaf.dtype, leaf.requires_grad) for leaf in leaves))
        chosen = self.choices.get(kind)
        if chosen is not None and chosen.kept is None:
            return forward(*arguments, **keywords)
        if chosen is not None:
            region = Region(self.device, self.shelf, self.visit, keep_chosen(chosen))
            return region.run(module, forward, arguments, keywords)
        inputs = [leaf for leaf in leaves if is_input(leaf)]
        capture = Capture(module, [leaf for leaf in leaves if not is_input(leaf)])
        output = Region(self.device, self.shelf, self.visit, capturing(capture)).run(
            module, forward, arguments, keywords
        )
        described = capture.description(bytes_of(inputs, self.shelf.resting_bytes))
        self.descriptions[kind], self.choices[kind] = described, self._choose(described)
        return output

    def _choose(self, described: BlockActivations) -> Choice:
        """An equal share of the budget for each block."""
        budget = self.section.budget_bytes
        assert budget is not None
        try:
            return cheapest(described, budget // self.blocks)
        except ValueError:
            raise ValueError(
                f"activation_checkpointing.budget_bytes = {budget}; allowed: at least"
                f" {described.input_bytes * self.blocks}, the inputs of {self.blocks} blocks"
            ) from None


def _predecessors(model: nn.Module, blocks: Sequence[nn.Module], every: int) -> dict[nn.Module, nn.Module]:
    """For each block but the first of a segment, the one before it in its list."""
    known, follows = set(blocks), {}
    for holder in model.modules():
        run = [child for child in holder.children() if child in known]
        for number in range(len(run)):
            if number % every:
                follows[run[number]] = run[number - 1]
    return follows


class Recomputed:
    """The forward of a block: as before to whoever calls it."""

    def __init__(self, recompute: Recompute, module: nn.Module) -> None:
        self._recompute, self._module, self._forward = recompute, module, module.forward
        update_wrapper(self, module.forward)

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        return self._recompute.run(self._module, self._forward, arguments, keywords)


# One forward, and the same once more #


class Place:
    """Stands for a tensor that autograd saved. Its `value` is here from the recomputation until it is used."""

    __slots__ = ("__weakref__", "region", "value")

    def __init__(self, region: "Region") -> None:
        self.region, self.value = region, None  # type: Region, Tensor | None

    @staticmethod
    def look(place: "Place") -> Tensor:
        """The tensor; a second look (a graph that is retained) computes it again."""
        if place.value is None:
            place.region.run_again()
        value, place.value = place.value, None
        assert value is not None
        return value


@dataclass(frozen=True)
class Returned:
    """An argument that is output number `output` of call number `call` of the same region."""

    call: int
    output: int


@dataclass(frozen=True)
class Call:
    """One forward of a block, and all that it depended on.

    Attributes:
        arguments: leaves of the positional and keyword arguments in `structure`; inputs as what rests of them.
        random: state of the generators before, if it drew numbers.
        precision: autocast as it was, made anew for each use.
    """

    module: nn.Module
    forward: Forward
    arguments: tuple[Any, ...]
    structure: TreeSpec
    random: dict[str, Tensor]
    precision: Callable[[], AbstractContextManager[Any]]
    outputs: tuple[weakref.ref[Tensor] | None, ...] = ()


class _Filled(BaseException):
    """All places are filled: what is left of the forward is not needed."""


class Region:
    """Blocks that are computed again together: one, or a segment. It lives as long as autograd's graph needs it."""

    def __init__(self, device: torch.device, shelf: Shelf, visit: Visit, keeping: Keeping) -> None:
        self.device, self.shelf, self.visit, self.keeping = device, shelf, visit, keeping
        self.calls: list[Call] = []
        self._places: list[tuple[weakref.ref[Place], torch.Size, torch.dtype]] = []

    def run(self, module: nn.Module, forward: Forward, arguments: tuple, keywords: dict[str, Any]) -> Any:
        """The forward; afterwards the region has what it takes to run it again."""
        leaves, structure = tree_flatten((arguments, keywords))
        resting = tuple(self._put(leaves))
        before, precision = _random_states(self.device), _autocast(self.device)
        with precision(), saved_tensors_hooks(self._save, Place.look), self.keeping.first:
            output = forward(*arguments, **keywords)
        now = _random_states(self.device)
        drew = any(not torch.equal(state, now[name]) for name, state in before.items())
        outputs = tuple(weakref.ref(leaf) if isinstance(leaf, Tensor) else None for leaf in tree_leaves(output))
        self.calls.append(Call(module, forward, resting, structure, before if drew else {}, precision, outputs))
        return output

    def returned(self, arguments: tuple, keywords: dict[str, Any]) -> bool:
        """Whether one of these arguments is what a block of this region returned."""
        return any(isinstance(self._origin(leaf), Returned) for leaf in tree_leaves((arguments, keywords)))

    def _put(self, leaves: list[Any]) -> Iterator[Any]:
        """Each leaf as what will stand for it. Tensors without gradients, which blocks share, rest where they are."""
        leaves = [self._origin(leaf) for leaf in leaves]
        resting = iter(self.shelf.put([leaf for leaf in leaves if is_input(leaf)]))
        for leaf in leaves:
            yield next(resting) if is_input(leaf) else leaf

    def _origin(self, leaf: Any) -> Any:
        """`leaf`, or where it came from in this region."""
        for number, call in enumerate(self.calls):
            for position, output in enumerate(call.outputs):
                if isinstance(leaf, Tensor) and output is not None and output() is leaf:
                    return Returned(number, position)
        return leaf

    def _save(self, tensor: Tensor) -> Place:
        place = Place(self)
        self._places.append((weakref.ref(place), tensor.shape, tensor.dtype))
        self.keeping.saved(tensor)
        return place

    def run_again(self) -> None:
        """Run the calls once more, up to the last tensor that autograd saved in the first run.

        Raises:
            RuntimeError: it saved other tensors than the first time.
        """
        filled = 0

        def fill(tensor: Tensor) -> Tensor:
            nonlocal filled
            reference, shape, dtype = self._places[filled]
            if (tensor.shape, tensor.dtype) != (shape, dtype):
                raise self._differs(f"{tuple(tensor.shape)} {tensor.dtype} for {tuple(shape)} {dtype}")
            filled += 1
            values = tensor.detach()
            if (place := reference()) is not None:
                place.value = values
            if filled == len(self._places):
                raise _Filled
            return values

        try:
            with torch.enable_grad(), saved_tensors_hooks(fill, lambda values: values):
                outputs: list[list[Any]] = []
                for call in self.calls:
                    with self.visit(call.module):
                        outputs.append(self._call_again(call, outputs))
        except _Filled:
            return
        raise self._differs(f"{filled} tensors for {len(self._places)}")

    def _call_again(self, call: Call, outputs: list[list[Any]]) -> list[Any]:
        leaves = [
            outputs[leaf.call][leaf.output]
            if isinstance(leaf, Returned)
            else leaf.fetch()
            if isinstance(leaf, Reference | Copy)
            else leaf
            for leaf in call.arguments
        ]
        arguments, keywords = tree_unflatten(leaves, call.structure)
        with _random_numbers_of(self.device, call.random), call.precision(), self.keeping.again:
            return tree_leaves(call.forward(*arguments, **keywords))

    def _differs(self, how: str) -> RuntimeError:
        return RuntimeError(
            f"computed again, a {type(self.calls[0].module).__name__} saved {how}: its forward must do the same"
            " every time (a cache that grows does not: pass use_cache=False)"
        )


def _random_states(device: torch.device) -> dict[str, Tensor]:
    """Of the generators; none on the simulated device, where nothing is drawn."""
    return {} if device.type == "sim" else random_states(device)


@contextmanager
def _random_numbers_of(device: torch.device, states: dict[str, Tensor]) -> Iterator[None]:
    """Random numbers as they were drawn first; afterwards the generators go on where they were."""
    if not states:
        yield
        return
    now = random_states(device)
    set_random_states(states, device)
    try:
        yield
    finally:
        set_random_states(now, device)


def _autocast(device: torch.device) -> Callable[[], AbstractContextManager[Any]]:
    """torch.autocast as it is now, for later.

    Without its cache of cast weights: a weight that the forward found there would be cast in the recomputation, which
    then has one operation more.
    """
    kind = device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return nullcontext
    dtype = torch.get_autocast_dtype(kind)
    return lambda: torch.autocast(kind, dtype=dtype, cache_enabled=False)
