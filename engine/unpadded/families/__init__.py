"""The families of checkpoints, one module each, all with the same few names. Nothing else knows a family."""

from collections.abc import Collection, Mapping
from typing import Any, Protocol

from unpadded.families import bert, nomic_bert
from unpadded.spec import EncoderSpec, Slot


class Family(Protocol):
    """What a family's module holds."""

    PREFIXES: tuple[str, ...]  # that some savers put before every tensor name
    IGNORED: tuple[str, ...]  # patterns of tensor names, without prefix, that the encoder does not need
    MAX_LENGTH: int | None  # tokens, where no file says it; None: the rows of the position table
    PROMPTS: Mapping[str, str]  # task -> prefix, where no file says it
    MATRYOSHKA: Mapping[str, tuple[int, ...]]  # name of a published model -> the dimensions it was trained for
    MATRYOSHKA_LAYER_NORM: bool  # a layer norm without affine comes before the cut

    def matches(self, config: Mapping[str, Any], names: Collection[str]) -> bool: ...

    def read_config(self, config: Mapping[str, Any]) -> EncoderSpec: ...

    def slots(self, spec: EncoderSpec) -> dict[str, Slot]: ...


FAMILIES: dict[str, Family] = {"nomic_bert": nomic_bert, "bert": bert}
