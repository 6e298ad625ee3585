"""Types of HTTP response bodies, for the OpenAPI document. Two of them allow further fields.

Handlers build plain dicts; a test fails if a response has a field that is not declared here.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, NotRequired

from pydantic import Field
from typing_extensions import TypedDict

Count = Annotated[int, Field(ge=0)]
Logprob = Annotated[float, Field(ge=-9999.0, le=0.0)]
Reasoning = Annotated[str, Field(description="the reasoning of the model")]
BeamScore = Annotated[
    float, Field(description="log-probability divided by the length to the power `length_penalty`")
]
FinishReason = Literal["stop", "length", "tool_calls"]


class ErrorReason(TypedDict):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorObject(TypedDict):
    error: ErrorReason


class CachedTokens(TypedDict):
    cached_tokens: Count


class PoolingUsage(TypedDict):
    prompt_tokens: Count
    total_tokens: Count
    prompt_tokens_details: NotRequired[CachedTokens]


class UsageObject(PoolingUsage):
    completion_tokens: Count


class ModelObject(TypedDict):
    id: str
    object: Literal["model"]
    created: int
    owned_by: Literal["expertmesh"]
    root: str
    parent: str | None
    max_model_len: Count | None
    embedding_pooling: list[Literal["last", "mean"]]


class ModelList(TypedDict):
    object: Literal["list"]
    data: list[ModelObject]


class PromptLogprob(TypedDict):
    logprob: Logprob
    rank: Count
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None] | None


class FinishObject(TypedDict):
    finish_reason: FinishReason
    stop_reason: str | Count | None
    beam_score: NotRequired[BeamScore]


class ChunkFinishObject(TypedDict):
    finish_reason: FinishReason | None
    stop_reason: str | Count | None


class GenerationHead(TypedDict):
    id: str
    created: int
    model: str
    system_fingerprint: str


class CompletionLogprobs(TypedDict):
    text_offset: list[Count]
    token_logprobs: list[Logprob | None]
    tokens: list[str]
    top_logprobs: list[dict[str, Logprob] | None]


class CompletionText(TypedDict):
    index: Count
    text: str
    logprobs: CompletionLogprobs | None
    token_ids: NotRequired[list[Count]]
    prompt_token_ids: NotRequired[list[Count] | None]
    prompt_logprobs: NotRequired[PromptLogprobs]


class CompletionChoice(CompletionText, FinishObject):
    pass


class CompletionChunkChoice(CompletionText, ChunkFinishObject):
    pass


class Completion(GenerationHead):
    object: Literal["text_completion"]
    choices: list[CompletionChoice]
    usage: UsageObject


class CompletionChunk(GenerationHead):
    object: Literal["text_completion"]
    choices: list[CompletionChunkChoice]
    usage: NotRequired[UsageObject]


class NamedToken(TypedDict):
    token: str
    logprob: Logprob
    bytes: list[Count]


class ChatToken(NamedToken):
    top_logprobs: list[NamedToken]


class ChatLogprobs(TypedDict):
    content: list[ChatToken]


class CalledFunctionObject(TypedDict):
    name: str
    arguments: str


class ToolCall(TypedDict):
    id: str
    type: Literal["function"]
    function: CalledFunctionObject


class FunctionDelta(TypedDict):
    arguments: str
    name: NotRequired[str]


class ToolCallDelta(TypedDict):
    index: Count
    function: FunctionDelta
    id: NotRequired[str]
    type: NotRequired[Literal["function"]]


class AssistantMessage(TypedDict):
    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning_content: NotRequired[Reasoning]
    tool_calls: NotRequired[list[ToolCall]]


class MessageDelta(TypedDict):
    role: NotRequired[Literal["assistant"]]
    content: NotRequired[str]
    reasoning_content: NotRequired[Reasoning]
    tool_calls: NotRequired[list[ToolCallDelta]]


class ChatTokens(TypedDict):
    index: Count
    logprobs: ChatLogprobs | None
    token_ids: NotRequired[list[Count]]


class ChatChoice(ChatTokens, FinishObject):
    message: AssistantMessage
    prompt_token_ids: NotRequired[list[Count]]


class ChatChunkChoice(ChatTokens, ChunkFinishObject):
    delta: MessageDelta


class ChatHead(GenerationHead):
    prompt_token_ids: NotRequired[list[Count]]
    prompt_logprobs: NotRequired[PromptLogprobs]


class ChatCompletion(ChatHead):
    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: UsageObject


class ChatCompletionChunk(ChatHead):
    object: Literal["chat.completion.chunk"]
    choices: list[ChatChunkChoice]
    usage: NotRequired[UsageObject]


class TokenizedObject(TypedDict):
    count: Count
    max_model_len: Count | None
    tokens: list[Count]
    token_strs: list[str] | None


class DetokenizedObject(TypedDict):
    prompt: str


class Score(TypedDict):
    object: Literal["score"]
    index: Count
    score: float


class Embedding(TypedDict):
    object: Literal["embedding"]
    index: Count
    embedding: list[float] | str


class Classification(TypedDict):
    index: Count
    label: str
    probs: list[float]
    logits: list[float]
    num_classes: Count


class PoolingHead(TypedDict):
    id: str
    object: Literal["list"]
    created: int
    model: str
    usage: PoolingUsage


class Embeddings(PoolingHead):
    data: list[Embedding]


class Classifications(PoolingHead):
    data: list[Classification]


class Scores(PoolingHead):
    data: list[Score]


class BankRoutes(TypedDict):
    bank: str
    layer: Count  # has further fields: docs/reference/outputs.md


class RouterLogits(TypedDict):
    bank: str
    layer: Count
    logits: list[Any]


class InspectedPrompt(TypedDict):
    index: Count
    num_tokens: Count
    logits: NotRequired[list[Any]]
    logprobs: NotRequired[list[Logprob | None]]
    hidden_states: NotRequired[list[Any]]
    attentions: NotRequired[list[Any]]
    router_logits: NotRequired[list[RouterLogits]]
    routes: NotRequired[list[BankRoutes]]


class InspectionObject(TypedDict):
    id: str
    object: Literal["inspection"]
    model: str
    data: list[InspectedPrompt]
    loss: float | None
    usage: PoolingUsage
    aux_loss: NotRequired[dict[str, float]]


class ClusterView(TypedDict):
    schema: Literal[1]  # has further fields: docs/reference/processes.md


class ReadinessObject(TypedDict):
    ready: bool
    reasons: list[str]


class VersionObject(TypedDict):
    version: str
    ray: str | None
    torch: str | None
    model: str
    placement_epoch: Count
