"""Families of checkpoints, one module each with one value, FAMILY. No other code depends on a family's name.

To add a family:

1. `read_config` reads config.json into an `EncoderSpec` with the functions of `json_config`, whose errors name key,
   value and remedy: sizes with `required`, alternative keys with `consistent` and `one_of`. `require_defaults` rejects
   everything that the family's own code supports and the encoder does not.
2. `tensors` returns the shape and the stored names of every tensor of `EncoderWeights` and its layers, most of them
   with `weight_and_bias`. Several names in one spelling are stacked (q, k, v; gate, up). A stored tensor that is
   neither named there nor matches a pattern of `ignored` raises WeightsError. `bert` has functions for BERT's names.
3. `matches` decides by model_type, and by the names of the tensors if model_type is absent or shared.
4. Add FAMILY to FAMILIES; the first family that matches is used.
5. `tests/test_family_<name>.py` tests the published configuration, parity with transformers' class or a reference, one
   error per unsupported feature, and independence, with the checks of `tests/support/family_checks.py`. Add the
   configuration to `test_families.py`, and published values of the real weights to `test_checkpoints_real.py`.

An encoder that `EncoderSpec` cannot describe gets a new field there and one place in `model/encoder.py` that uses it,
never a subclass or a condition on a family's name. `xlm_roberta` shows how small a family can be.
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
    "modernbert": modernbert.FAMILY,  # before nomic_bert, whose tensor names it shares
    "nomic_bert": nomic_bert.FAMILY,
    "gte": gte.FAMILY,
    "jina_code": jina_code.FAMILY,
    "jina_bert": jina_bert.FAMILY,
    "jina_v3": jina_v3.FAMILY,
    "xlm_roberta": xlm_roberta.FAMILY,
    "bert": bert.FAMILY,
}
