"""What every section of ``params.yaml`` is: frozen, strict, with numbers and names that fit everywhere."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from typing_extensions import Self

from wav.errors import shown

LARGEST = 2**31 - 1
#: part of a file's name
Name = Annotated[str, Field(pattern=r"^\w[\w.:-]*$", max_length=100)]
#: lists whose entries are names
UNIQUE = ("suites", "tasks", "views", "variants")
#: A switch that may decide for itself. YAML 1.1 reads on and off as booleans, which mean the same.
Switch = Annotated[
    Literal["auto", "on", "off"],
    BeforeValidator(lambda value: {True: "on", False: "off"}[value] if isinstance(value, bool) else value),
]


class Section(BaseModel):
    """A frozen section of params.yaml; refuses unknown names, infinities, NaN and numbers too large for an array."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="after")
    def _sound(self) -> Self:
        for name, value in self:
            if isinstance(value, int) and abs(value) > LARGEST:
                raise ValueError(f"{name} = {shown(value)}: whole numbers lie between -{LARGEST} and {LARGEST}")
            if isinstance(value, str) and not value.isprintable():
                raise ValueError(f"{name} = {shown(value)}: holds characters that cannot be printed; take them out")
            if isinstance(value, tuple) and name in UNIQUE and len(set(value)) < len(value):
                raise ValueError(f"{name} = {shown(list(value))}: names something twice; name each once")
        return self
