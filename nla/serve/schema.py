"""What goes over the wire: the requests and responses of every route, with their limits and an example each.

Names and shapes follow Neuronpedia's NLA server, so that its clients can talk to this one; what it does not have
(samples, claims, trust, steering, pairs) stands beside.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

MAX_CHARACTERS = 65_536
MAX_MESSAGES = 512
MAX_POSITIONS = 512
MAX_SAMPLES = 16
MAX_VECTORS = 512
MAX_WIDTH = 32_768
MAX_NEW_TOKENS = 4096
MAX_COMPLETION_TOKENS = 512
MAX_DESCRIPTION = 8192
LARGEST_SEED = 2**63 - 1

LINE = "In spring Anna left a red ribbon near the rat,\n"
"""The text of the examples: Couplets plans its rhyme at the line break."""
VECTOR = [0.1, -0.2, 0.3, -0.4] * 32
"""As wide as Couplets."""


class Wire(BaseModel):
    """What is sent or received: no field that is not known, no number that is not finite."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


def _example(**fields: Any) -> ConfigDict:
    return ConfigDict(json_schema_extra={"examples": [fields]})


Vector = Annotated[list[float], Field(min_length=1, max_length=MAX_WIDTH)]
Temperature = Annotated[float, Field(ge=0, le=5, description="Of sampling; 0: the likeliest text, and one sample.")]
Seed = Annotated[int, Field(ge=0, le=LARGEST_SEED)]
PairName = Annotated[str | None, Field(max_length=1024, description="One of those that /pairs lists; null: the first.")]


# Requests


class Message(Wire):
    """A message of a chat."""

    role: str = Field(max_length=64, description="user, assistant, system or tool.")
    content: str = Field("", max_length=MAX_CHARACTERS)
    channel: None = Field(None, description="Of Neuronpedia's; no target here has channels.")


class Edit(Wire):
    """An explanation and what it is changed into."""

    before: str = Field(max_length=MAX_DESCRIPTION, description='"" means no explanation at all.')
    after: str = Field(max_length=MAX_DESCRIPTION)


class Steer(Wire):
    """A direction that is added to the target's activation at one token, in every pass that reads it."""

    position: int = Field(-1, description="Token index; negative from the end.")
    point: str | None = Field(
        None, max_length=64, description="Where in the target, such as resid_post.2; null: the pair's own point."
    )
    strength: float = Field(1.0, ge=-100, le=100, description="In lengths of the activation.")
    vector: Vector | None = Field(None, description="The direction; its length does not count.")
    edit: Edit | None = Field(None, description="The direction from one explanation's reconstruction to another's.")
    control: Seed | None = Field(
        None, description="A seed: instead of the direction a random one of equal norm, to hold the steering against."
    )

    @model_validator(mode="after")
    def _one_direction(self) -> Self:
        if (self.vector is None) == (self.edit is None):
            raise ValueError("either a vector or an edit")
        return self


class Read(Wire):
    """A text or a chat, the pair that reads it, and the adapter on the target."""

    text: str | None = Field(None, max_length=MAX_CHARACTERS)
    messages: list[Message] | None = Field(
        None, min_length=1, max_length=MAX_MESSAGES, description="A chat, rendered by the target's own template."
    )
    add_generation_prompt: bool = Field(
        True, description="Of a chat that ends with another's message: also read what opens the assistant's answer."
    )
    continue_final_message: bool = Field(
        False, description="Of a chat that ends with the assistant's message: it is read without an end."
    )
    enable_thinking: None = Field(None, description="Of Neuronpedia's; chats are rendered by the template's default.")
    pair: PairName = None
    target_adapter: str | None = Field(
        None, max_length=1024, description="An adapter on the target; one of those that /pairs lists."
    )

    @model_validator(mode="after")
    def _short_chat(self) -> Self:
        if sum(len(message.content) for message in self.messages or ()) > MAX_CHARACTERS:
            raise ValueError(f"messages of at most {MAX_CHARACTERS} characters together")
        return self


class Source(Read):
    """A text or a chat, and one of them."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.text is None) == (self.messages is None):
            raise ValueError("either text or messages")
        return self


class Sampling(Wire):
    """How explanations are sampled."""

    samples: int = Field(4, ge=1, le=MAX_SAMPLES, description="Explanations of each activation.")
    temperature: Temperature = 1.0
    seed: Seed = 0
    max_new_tokens: int | None = Field(
        None, ge=1, le=MAX_NEW_TOKENS, description="Longest explanation; null: as in training."
    )


class Writing(Sampling):
    """Explanations that may be streamed."""

    stream: bool = Field(False, description="Answer with server-sent events as the texts are written.")


class TokenizeRequest(Source):
    """Which tokens are there?"""

    model_config = _example(text=LINE)


class ExtractRequest(Source):
    """What are the activations?"""

    model_config = _example(text=LINE, positions=[-1])
    positions: list[int] | None = Field(
        None, max_length=MAX_POSITIONS, description="Token indexes, negative from the end; null or []: all."
    )
    steer: Steer | None = None


class ExplainRequest(ExtractRequest, Writing):
    """What do the activations of a text hold, in words?"""

    model_config = _example(text=LINE, positions=[-1], samples=2)
    near: int | None = Field(None, description="A token index: the tokens nearest to it are explained first.")
    reverse: bool = Field(False, description="Without near: from the last token to the first.")


class DescribeRequest(Writing):
    """What do vectors hold, in words?"""

    model_config = _example(activations=[VECTOR], samples=2)
    activations: list[Vector] = Field(min_length=1, max_length=MAX_VECTORS)
    pair: PairName = None


class CompareRequest(Sampling):
    """What has one activation that another has not?"""

    model_config = _example(activation_a=VECTOR, activation_b=[-x for x in VECTOR[:64]] + VECTOR[64:], samples=2)
    activation_a: Vector
    activation_b: Vector
    pair: PairName = None


class ScoreRequest(Read):
    """How well does an explanation rebuild an activation: a vector, or that of one token of a text or chat?"""

    model_config = _example(description="The next line ends with cat.", text=LINE)
    description: str = Field(min_length=1, max_length=MAX_DESCRIPTION)
    activation: Vector | None = None
    position: int = Field(-1, description="Token index in the text or chat; negative from the end.")
    before: str | None = Field(
        None, max_length=MAX_DESCRIPTION, description="Another explanation, to see how far the reconstruction moves."
    )

    @model_validator(mode="after")
    def _one_activation(self) -> Self:
        if [self.activation, self.text, self.messages].count(None) != 2:
            raise ValueError("one of activation, text and messages")
        return self


class CompletionRequest(Source):
    """How does the target go on?"""

    model_config = _example(
        text=LINE,
        completion_tokens=12,
        steer={"edit": {"before": "The next line ends with cat.", "after": "The next line ends with bat."}},
    )
    completion_tokens: int = Field(16, ge=1, le=MAX_COMPLETION_TOKENS)
    temperature: Temperature = 0.0
    seed: Seed = 0
    stream: bool = False
    steer: Steer | None = None


# Responses


class Token(Wire):
    """One token of a text."""

    token: str = Field(description="Its characters; tokens that are parts of one character share them.")
    token_id: int
    position: int
    start: int = Field(description="Where its characters begin in the text.")
    end: int
    fragment_index: int = Field(0, description="Which part of its character it is, from 0.")
    fragment_count: int = Field(1, description="In how many parts its character is.")
    added: bool = Field(False, description="By the tokenizer, such as the token that begins every text.")
    role: str | None = Field(None, description="Of a chat: whose message it is in.")
    message_index: int | None = None
    section: str | None = Field(None, description="Of a chat: content, reasoning, calls, tools or the template's own.")


class TokenizeResponse(Wire):
    """The tokens of a text or chat."""

    text: str = Field(description="What the target reads; of a chat as its template writes it.")
    prompt_length: int
    tokens: list[Token]


class TokenActivation(Token):
    """A token and its activation."""

    activation: list[float]
    l2_norm: float


class ExtractResponse(Wire):
    """Activations of a text, in the order of the positions."""

    pair: str
    point: str
    layer_index: int
    tokens: list[TokenActivation]


class Sample(Wire):
    """One sampled explanation."""

    text: str
    claims: list[str]
    complete: bool = Field(description="It is one whole explanation.")
    cosine: float = Field(description="Of the activation and the reconstruction from this text alone.")


class Trust(Wire):
    """How far an explanation can be trusted."""

    level: Literal["low", "medium", "high"]
    cosine: float
    agreement: float | None = Field(description="How much the samples say the same, 0 to 1; null for one sample.")
    margin: float = Field(description="Cosine beyond what a text reaches that knows nothing of the activation.")


class Description(Wire):
    """An activation in words."""

    description: str = Field(description="The explanation that most samples gave, the first of equals.")
    mse: float = Field(description="2 (1 - cosine): 0 is perfect, 2 is unrelated.")
    cosine_similarity: float = Field(description="Mean over samples.")
    samples: list[Sample]
    trust: Trust


class DescribeResponse(Wire):
    """Descriptions in the order of the activations."""

    pair: str
    results: list[Description]


class ExplainResult(Token, Description):
    """A token and what its activation holds."""

    l2_norm: float
    generated: Literal[False] = False


class ExplainResponse(Wire):
    """Explanations in the order of the positions."""

    pair: str
    point: str
    layer_index: int
    results: list[ExplainResult]


class CompareResponse(Description):
    """The difference a - b in words."""

    pair: str
    diff_norm: float


class ScoreResponse(Wire):
    """An explanation held against an activation."""

    pair: str
    mse: float
    cosine_similarity: float
    margin: float = Field(description="Cosine beyond what a text reaches that knows nothing of the activation.")
    fve: float | None = Field(description="Share of variance explained; null where the pair has no baseline.")
    moved: float | None = Field(None, description="Cosine of this reconstruction and that of `before`.")


class CompletionResponse(Wire):
    """A text as the target continues it."""

    pair: str
    completion: str
    text: str = Field(description="The whole: what was given, and what the target wrote.")
    steered: bool
    seed: int


class Limits(Wire):
    """What a request may ask for."""

    max_input_chars: int = MAX_CHARACTERS
    max_positions_per_request: int = MAX_POSITIONS
    max_samples: int = MAX_SAMPLES
    max_new_tokens: int = MAX_NEW_TOKENS
    max_describe_batch: int = MAX_VECTORS
    max_description_chars: int = MAX_DESCRIPTION
    max_completion_tokens: int = MAX_COMPLETION_TOKENS
    max_body_bytes: int
    max_waiting: int
    timeout_s: float


class Health(Wire):
    """Whether the server works, and how much it has to do."""

    status: Literal["ok"]
    version: str
    waiting: int = Field(description="Requests that are being worked on or wait.")
    limits: Limits


class PairInfo(Wire):
    """A pair that is served."""

    name: str
    target: str
    point: str
    layer_index: int
    d_model: int
    context: int
    max_new_tokens: int = Field(description="Longest explanation, as in training.")
    chat: bool = Field(description="The target has a chat template: messages can be given.")
    activation_norm: float | None
    doubts: list[str] = Field(description="What the pair's own measurements say against it.")
    metrics: dict[str, Any]
    target_adapters: list[str]


class Pairs(Wire):
    """All pairs; requests that name none are answered by the first."""

    pairs: list[PairInfo]


class Error(Wire):
    """Why a request is refused or failed, and what to do."""

    got: str
    expected: str
    fix: str


# Events


class StartEvent(Wire):
    """The first event: what is coming."""

    kind: Literal["start"] = "start"
    pair: str
    layer_index: int
    total: int = Field(description="Results that will come.")
    prompt_length: int | None = Field(None, description="Tokens of the text.")
    positions: list[int] | None = Field(None, description="In the order in which they are explained.")


class TextEvent(Wire):
    """What has been written so far of one sample."""

    kind: Literal["text"] = "text"
    position: int = Field(description="The token; of /describe the number of the activation; of /completion 0.")
    sample: int = 0
    text: str
    done: Literal[False] = False


class ExplainEvent(ExplainResult):
    """A token is done."""

    kind: Literal["result"] = "result"
    done: Literal[True] = True


class DescribeEvent(Description):
    """An activation is done."""

    kind: Literal["result"] = "result"
    position: int
    done: Literal[True] = True


class CompletionEvent(CompletionResponse):
    """The continuation is done."""

    kind: Literal["result"] = "result"
    done: Literal[True] = True


class ErrorEvent(Error):
    """The last event if the work failed."""

    kind: Literal["error"] = "error"
