"""What requests and answers look like: the OpenAPI document comes from these."""

from typing import Annotated

from onerec_jax.errors import InputError
from onerec_jax.serving.config import ServiceConfig

try:
    from pydantic import (
        BaseModel,
        ConfigDict,
        Discriminator,
        Field,
        StrictBool,
        StrictInt,
        StringConstraints,
        Tag,
        create_model,
    )
except ImportError as error:
    raise InputError('the server needs more packages: pip install -e ".[serve]"') from error


def _one_of(choose, **types):
    """A union in which the value itself says which type it must be: one error, not one a type.

    The tags hold a blank, by which errors leave them out.
    """
    union = None
    for tag, kind in types.items():
        tagged = Annotated[kind, Tag(f"as {tag}")]
        union = tagged if union is None else union | tagged
    return Annotated[union, Discriminator(lambda value: f"as {choose(value)}")]


def where(location) -> str:
    """The place of an error in a request."""
    return ".".join(str(part) for part in location if " " not in str(part))[:200]


def explain(error: dict) -> str:
    """What pydantic found wrong with a request, on one line."""
    kind, location = error["type"], error["loc"]
    if kind == "json_invalid":
        return f"the body is no JSON: {error['ctx']['error']} at character {location[-1]}"
    if where(location) == "body.user_id" and kind == "missing":
        return "body: give a user_id or a history"
    if where(location) == "body.user_id" and kind == "extra_forbidden":
        return "body: give a user_id or a history, not both"
    return f"{where(location)}: {error['msg']}"


Text = Annotated[str, StringConstraints(strict=True, max_length=200)]
Id = Annotated[
    _one_of(lambda value: "number" if type(value) is int else "text", number=StrictInt, text=Text),
    Field(description="As in the data set; a number or its text."),
]
Time = Annotated[StrictInt, Field(ge=0, lt=2**53, description="Unix time in seconds.")]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Seconds = Annotated[Number, Field(ge=0, lt=2**31)]
Flag = Annotated[StrictInt, Field(ge=0, le=1)]


class Action(BaseModel):
    """An item and what the user did with it; what is left out is unknown."""

    model_config = ConfigDict(extra="forbid")
    item_id: Id
    time_s: Time | None = None
    rating: Number | None = None
    playtime_s: Seconds | None = None
    duration_s: Seconds | None = None
    click: Flag | None = None
    like: Flag | None = None
    follow: Flag | None = None
    comment: Flag | None = None
    forward: Flag | None = None
    hate: Flag | None = None
    long_view: Flag | None = None
    profile_enter: Flag | None = None


class Item(BaseModel):
    item_id: int | str
    title: str
    semantic_id: list[int]


class Details(Item):
    brand: str | None = None
    author_id: int | str | None = None
    tags: list[str] | None = None
    duration_s: float | None = None
    text: str | None = None
    training_actions: int = Field(description="In the training part of the log.")


class Ranked(Item):
    logp: float = Field(description="log P(semantic ID | user); items of one ID share it.")


class Recommendations(BaseModel):
    items: list[Ranked]
    beam_width: int = Field(description="The one used: the next that is compiled.")
    step: int = Field(description="Training step of the model.")


class Like(Item):
    cosine: float = Field(description="Of the content vectors that the codes stand for.")
    shared_levels: int = Field(description="Leading codes in common.")


class Similar(BaseModel):
    item: Item
    items: list[Like]


class User(BaseModel):
    user_id: int | str
    actions: int
    history: list[Item] = Field(description="The latest, newest first.")


class Items(BaseModel):
    items: list[Item]


class Users(BaseModel):
    users: list[int | str]


class Status(BaseModel):
    status: str


class Error(BaseModel):
    error: str = Field(description="One line: what is wrong and what to do.")


def request_models(config: ServiceConfig):
    """The body of `/v1/recommend` under the server's limits.

    Returns:
      A type that FastAPI reads: a request with `user_id`, or one with `history`.
    """
    many = Field(max_length=config.max_history)
    options = {
        "n": (Annotated[StrictInt, Field(ge=1, le=config.max_n)], min(10, config.max_n)),
        "beam_width": (
            Annotated[StrictInt, Field(ge=1, le=config.widths[-1])],
            config.widths[0],
        ),
        "exclude_items": (Annotated[list[Id], many], []),
        "exclude_authors": (Annotated[list[Id], many], []),
        "allowed_items": (
            Annotated[list[Id], Field(max_length=config.filter_size, min_length=1)] | None,
            None,
        ),
        "include_seen": (StrictBool, False),
        "request_time_s": (Time | None, None),
    }
    entry = _one_of(
        lambda x: "action" if isinstance(x, dict | Action) else "id", action=Action, id=Id
    )
    strict = ConfigDict(extra="forbid")
    by_user = create_model("ByUser", __config__=strict, user_id=(Id, ...), **options)
    by_history = create_model(
        "ByHistory", __config__=strict, history=(Annotated[list[entry], many], ...), **options
    )

    def kind(body):
        return "history" if isinstance(body, dict) and "history" in body else "user"

    return _one_of(kind, user=by_user, history=by_history)
