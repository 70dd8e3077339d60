"""The vocabulary of a pipeline schedule: who computes what in which order, and which messages pass between.

The model is cut in `ranks * chunks` *virtual stages*; a rank holds `chunks` of them, and a step takes `micro_batches`
micro-batches through all. A *plan* is one tuple of items per rank, in the order in which that rank issues them. Made by
collectives/pipeline_schedules.py it holds computation alone; collectives/pipeline_messages.py adds the messages.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

FORWARD, BACKWARD, INPUT, WEIGHT = "F", "B", "I", "W"
KINDS = (FORWARD, BACKWARD, INPUT, WEIGHT)
"""Forward; the whole backward; its part for the gradient of the input; its part for the gradients of the weights."""

ACTIVATION, GRADIENT = "activation", "gradient"
LOOP, V = "loop", "V"
"""Placements: stage s on rank s mod ranks; or down the ranks and back up, two chunks each."""


@dataclass(frozen=True, slots=True)
class Action:
    """Compute on a micro-batch with one of the rank's chunks."""

    kind: str
    chunk: int
    micro_batch: int

    def __str__(self) -> str:
        return f"{self.kind}{_name(self.chunk, self.micro_batch)}"


@dataclass(frozen=True, slots=True)
class Send:
    """Send what `chunk` made of a micro-batch: its activation onward, or the gradient of its input back.

    Attributes:
        what: "activation" or "gradient".
        chunk: of the rank that sends.
    """

    what: str
    chunk: int
    micro_batch: int
    peer: int

    def __str__(self) -> str:
        return f"send {self.what} {_name(self.chunk, self.micro_batch)} to rank {self.peer}"


@dataclass(frozen=True, slots=True)
class Recv:
    """Receive what `chunk` needs: its input, or the gradient of its output.

    Attributes:
        what: "activation" or "gradient".
        chunk: of the rank that receives.
    """

    what: str
    chunk: int
    micro_batch: int
    peer: int

    def __str__(self) -> str:
        return f"receive {self.what} {_name(self.chunk, self.micro_batch)} from rank {self.peer}"


Message = Send | Recv


@dataclass(frozen=True, slots=True)
class Exchange:
    """Messages that are posted together (a batched isend and irecv); the rank goes on when all of them have met."""

    messages: tuple[Message, ...]

    def __str__(self) -> str:
        return "exchange (" + ", ".join(map(str, self.messages)) + ")"


@dataclass(frozen=True, slots=True)
class Post:
    """Messages that are posted together while the rank goes on at once; the end of the step waits for the sends."""

    messages: tuple[Message, ...]

    def __str__(self) -> str:
        return "post (" + ", ".join(map(str, self.messages)) + ")"


@dataclass(frozen=True, slots=True)
class Wait:
    """Wait until a posted receive has its message."""

    message: Recv

    def __str__(self) -> str:
        return f"wait to {self.message}"


Item = Action | Message | Exchange | Post | Wait
"""A Send or a Recv that stands alone is an exchange of one message: the rank goes on when it has met its partner."""


class Place(NamedTuple):
    """Where a virtual stage lives."""

    rank: int
    chunk: int


class Tag(NamedTuple):
    """What a message is, whoever looks at it: both sides name it alike.

    Attributes:
        gradient: or an activation.
        stage: that receives it.
    """

    gradient: bool
    stage: int
    micro_batch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What each pipeline rank does, in order.

    Attributes:
        schedule: the name of the schedule that it follows.
        micro_batches: that pass through; all of one training step, but where `micro_batches_per_step` is less.
        micro_batches_per_step: less than `micro_batches` where steps follow each other without a flush: then the plan
            shows several steps, of which those in the middle are in steady state.
        chunks: of the model on each rank.
        placement: "loop" (stage s on rank s mod ranks) or "V" (rank r has stages r and 2 * ranks - 1 - r).
        most_in_flight: by rank, how many activations (of one chunk and micro-batch) the schedule promises to keep at
            most, from a forward to the end of its backward, weight part included.
        programs: by rank.
    """

    schedule: str
    micro_batches: int
    micro_batches_per_step: int
    chunks: int
    placement: str
    most_in_flight: tuple[int, ...]
    programs: tuple[tuple[Item, ...], ...]

    @property
    def ranks(self) -> int:
        return len(self.programs)

    @property
    def stages(self) -> int:
        """Virtual stages: parts of the model."""
        return self.ranks * self.chunks

    @property
    def flushes(self) -> bool:
        """Whether every step drains the pipeline."""
        return self.micro_batches == self.micro_batches_per_step

    def stage(self, rank: int, chunk: int) -> int:
        """The virtual stage that a rank's chunk is."""
        if self.placement == V and chunk == 1:
            return 2 * self.ranks - 1 - rank
        return chunk * self.ranks + rank

    def place(self, stage: int) -> Place:
        """The inverse of `stage`."""
        chunk, rank = divmod(stage, self.ranks)
        return Place(self.ranks - 1 - rank if self.placement == V and chunk == 1 else rank, chunk)

    def actions(self, rank: int) -> Iterator[Action]:
        """What a rank computes, without its messages."""
        return (item for item in self.programs[rank] if isinstance(item, Action))

    def tag(self, rank: int, message: Message) -> Tag:
        """What a rank's message is."""
        gradient = message.what == GRADIENT
        stage = self.stage(rank, message.chunk)
        if isinstance(message, Send):
            stage += -1 if gradient else 1
        return Tag(gradient, stage, message.micro_batch)


CLASSES = ("first", "middle", "last")
"""Of the micro-batches of a step: the first finds gathers under way, the last reduces; the others are alike."""

UPDATE = "update"
"""What a flight calls the phase after the last action of a step."""

_WORDS = {FORWARD: "forward", BACKWARD: "backward", INPUT: "input", WEIGHT: "weight"}


def class_of(number: int, micro_batches: int) -> str:
    """Which of CLASSES micro-batch `number` of a step is; a single one is the last."""
    if number >= micro_batches - 1:
        return "last"
    return "first" if number == 0 else "middle"


def phase_name(action: Action, micro_batches: int) -> str:
    """What a flight calls the phase of an action in a step of so many: "forward middle 0", the last word its chunk."""
    return f"{_WORDS[action.kind]} {class_of(action.micro_batch, micro_batches)} {action.chunk}"


def needs(plan: Plan, rank: int, action: Action) -> Recv | None:
    """The message that an action needs, from `peer`, which may be the rank itself; None at the ends of the model."""
    stage = plan.stage(rank, action.chunk)
    match action.kind:
        case "F" if stage > 0:
            return Recv(ACTIVATION, action.chunk, action.micro_batch, plan.place(stage - 1).rank)
        case "B" | "I" if stage < plan.stages - 1:
            return Recv(GRADIENT, action.chunk, action.micro_batch, plan.place(stage + 1).rank)
        case _:
            return None


def makes(plan: Plan, rank: int, action: Action) -> Send | None:
    """The message that an action makes, for `peer`, which may be the rank itself; None at the ends of the model."""
    stage = plan.stage(rank, action.chunk)
    match action.kind:
        case "F" if stage < plan.stages - 1:
            return Send(ACTIVATION, action.chunk, action.micro_batch, plan.place(stage + 1).rank)
        case "B" | "I" if stage > 0:
            return Send(GRADIENT, action.chunk, action.micro_batch, plan.place(stage - 1).rank)
        case _:
            return None


def kept(action: Action) -> int:
    """By how many an action changes the activations that its rank keeps: +1, -1 or 0."""
    return {FORWARD: 1, BACKWARD: -1, INPUT: 0, WEIGHT: -1}[action.kind]


def peak_in_flight(plan: Plan) -> tuple[int, ...]:
    """By rank, the most activations (of one chunk and micro-batch) that are kept at once."""
    return tuple(max(accumulate(map(kept, plan.actions(rank))), default=0) for rank in range(plan.ranks))


def messages(item: Item) -> tuple[Message, ...]:
    """What an item posts."""
    match item:
        case Send() | Recv():
            return (item,)
        case Exchange() | Post():
            return item.messages
        case _:
            return ()


def sent_messages(plan: Plan, rank: int) -> dict[str, int]:
    """How many activations and gradients a rank sends to others in all of the plan."""
    sent = {ACTIVATION: 0, GRADIENT: 0}
    for item in plan.programs[rank]:
        for message in messages(item):
            if isinstance(message, Send):
                sent[message.what] += 1
    return sent


def _name(chunk: int, micro_batch: int) -> str:
    """`5`, or `5.1` for chunk 1."""
    return f"{micro_batch}.{chunk}" if chunk else str(micro_batch)
