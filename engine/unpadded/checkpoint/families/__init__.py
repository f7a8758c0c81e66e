"""The families of checkpoints, one module each, all with the names of `Family`. Nothing else knows a family.

To add one:

1. Say what its encoder is in the words of `EncoderSpec`. `read_config` reads config.json with the functions of
   `config`, which name key, value and remedy in every refusal: sizes with `required`, alternatives with `agreed` and
   `one_of`, and with `refuse` everything that the family's own code would honor and the encoder does not have.
2. `slots` gives each tensor of `EncoderWeights` and `LayerWeights` its shape and the names it is stored under. Names in
   one alternative are stacked (q, k, v; gate, up), alternatives are spellings of the same, and `swapped` marks tensors
   that hold up before gate. What no slot claims and no pattern of IGNORED covers is refused at load, with a list.
   `bert` has functions for whatever keeps BERT's names.
3. `matches` decides by model_type, and by the names of the tensors where a model_type is absent or shared.
4. Enter the module in FAMILIES; the first that matches is taken.
5. `tests/test_family_<name>.py`: the published configuration, parity with transformers' class or a plain reference, a
   refusal for each thing left out, and independence. `tests/family_checks.py` holds the checks. The configuration goes
   into `test_families.py` too, and what others published of the real weights into `test_checkpoints_real.py`.

An encoder that the spec has no word for gets one there, and one place in `encoder` that honors it; never a subclass,
and never a family's name in a condition. Where it needs none this is a small diff: xlm_roberta is 37 lines here and two
below, and 149 of tests.
"""

from collections.abc import Collection, Mapping
from typing import Any, Protocol

from unpadded.checkpoint.families import (
    bert,
    eurobert,
    gte,
    jina_bert,
    jina_code,
    jina_v3,
    modernbert,
    nomic_bert,
    xlm_roberta,
)
from unpadded.checkpoint.spec import EncoderSpec, Slot


class Family(Protocol):
    """What a family's module holds."""

    PREFIXES: tuple[str, ...]  # that some savers put before every tensor name
    IGNORED: tuple[str, ...]  # patterns of tensor names, without prefix, that the encoder does not need
    MAX_LENGTH: int | None  # tokens, where no file says it; None: what the position table serves
    PROMPTS: Mapping[str, str]  # task -> prefix, where no file says it
    MATRYOSHKA: Mapping[str, tuple[int, ...]]  # name of a published model -> the dimensions it was trained for
    MATRYOSHKA_LAYER_NORM: bool  # a layer norm without affine comes before the cut

    def matches(self, config: Mapping[str, Any], names: Collection[str]) -> bool: ...

    def read_config(self, config: Mapping[str, Any]) -> EncoderSpec: ...

    def slots(self, spec: EncoderSpec) -> dict[str, Slot]: ...


FAMILIES: dict[str, Family] = {
    "eurobert": eurobert,
    "modernbert": modernbert,  # whose layers, without a model_type, bear NomicBERT's names
    "nomic_bert": nomic_bert,
    "gte": gte,
    "jina_code": jina_code,
    "jina_bert": jina_bert,
    "jina_v3": jina_v3,
    "xlm_roberta": xlm_roberta,
    "bert": bert,
}
