"""The families of checkpoints, one module each, all with the names of `Family`. Nothing else knows a family.

To add one:

1. Say what its encoder is in the words of `EncoderSpec`. `read_config` reads config.json with the functions of
   `config`, which name key, value and remedy in every refusal: sizes with `required`, alternatives with `agreed` and
   `one_of`, and with `refuse` everything that the family's own code would honor and the encoder does not have.
2. `slots` gives each tensor of `EncoderWeights` and of its layers its shape and the names it is stored under. Names in
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
from unpadded.checkpoint.family import Family

FAMILIES: dict[str, Family] = {
    "eurobert": eurobert.FAMILY,
    "modernbert": modernbert.FAMILY,  # whose layers, without a model_type, bear NomicBERT's names
    "nomic_bert": nomic_bert.FAMILY,
    "gte": gte.FAMILY,
    "jina_code": jina_code.FAMILY,
    "jina_bert": jina_bert.FAMILY,
    "jina_v3": jina_v3.FAMILY,
    "xlm_roberta": xlm_roberta.FAMILY,
    "bert": bert.FAMILY,
}
