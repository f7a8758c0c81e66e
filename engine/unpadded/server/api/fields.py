"""Types and fields that requests of several APIs have."""

from typing import Annotated, Any, Literal, TypeAlias

from msgspec import Meta, Struct

TokenId: TypeAlias = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Dimensions: TypeAlias = Annotated[int, Meta(ge=1, le=2**16)]
Texts: TypeAlias = Annotated[list[str], Meta(min_length=1)]
Input: TypeAlias = str | Annotated[list[str | TokenId | list[TokenId]], Meta(min_length=1)]
Direction: TypeAlias = Literal["right", "left", "Right", "Left"]

# Arguments of `ServedModel.embed` and `score` that are fields of a request, which may have other names in its JSON.
KEYWORDS = ("model", "task", "truncate", "truncation_direction", "dimensions", "normalize", "raw_scores")


class Request(Struct, forbid_unknown_fields=True, kw_only=True):
    """A request whose fields have the names in KEYWORDS, and in JSON those of its API: `field(name=...)`."""

    model: str | None = None  # as in `Service.find`

    def keywords(self) -> dict[str, Any]:
        """Return the arguments of `embed` or `score`; the server and the model have those that are None."""
        given = {name: getattr(self, name, None) for name in KEYWORDS}
        direction = given.pop("truncation_direction") or "right"
        return {name: value for name, value in given.items() if value is not None} | {"truncation": direction.lower()}
