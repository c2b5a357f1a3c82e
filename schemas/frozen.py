"""The base of all values here."""

from pydantic import BaseModel, ConfigDict


class Frozen(BaseModel):
    """A value that never changes. Unknown fields are ignored: a later version may have written them."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    def __copy__(self) -> "Frozen":
        """Without what a `cached_property` made: `model_copy` changes fields of the copy."""
        copied = super().__copy__()
        for name in copied.__dict__.keys() - type(self).model_fields.keys():
            del copied.__dict__[name]
        return copied
