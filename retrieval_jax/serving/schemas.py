"""The forms of requests and responses, of which /docs and /openapi.json are made."""

from typing import Annotated, Literal

from pydantic import BaseModel, Field

HITS = 10  # passages of a response, where the request says nothing and as many may be asked for
Texts = Annotated[list[str], Field(fail_fast=True)]  # or each of a million wrong elements would be described

Hits = Annotated[
    int | None,
    Field(
        ge=1,
        description=f"passages to find for a query; null: {HITS}, or as many as may be asked for, which "
        "/v1/info says, where that is less",
    ),
]


class Error(BaseModel):
    """What every refused request gets."""

    error: str


class Doc(BaseModel):
    """A passage's text."""

    title: str
    text: str


class Candidate(BaseModel):
    """A passage that was found."""

    docid: str
    score: float | None
    rank: int = Field(description="from 1")
    doc: Doc | None = Field(description="null if texts were not wanted, or are not at the server")


class QueryText(BaseModel):
    """A query as it was read."""

    text: str
    truncated: bool = Field(description="whether only the beginning of the query was read")


class Answer(BaseModel):
    """What was found for one query."""

    query: QueryText
    candidates: list[Candidate]
    explanation: dict | None = Field(None, description="how they were found, as the searcher's kind has it")


class SearchResponse(Answer):
    """The response to one query, as Pyserini and Anserini have it."""

    api: Literal["v1"] = "v1"
    index: str
    took_ms: float = Field(description="milliseconds in the server")


class SearchParameters(BaseModel):
    """What a search is asked for in its address."""

    query: str = Field(description="the query")
    hits: Hits = None
    docs: bool = Field(True, description="whether the passages' texts are wanted")
    explain: bool = Field(False, description="whether to explain how the passages were found")


class SearchRequest(BaseModel):
    """Several queries at once."""

    queries: Texts = Field(min_length=1)
    hits: Hits = None
    docs: bool = Field(True, description="whether the passages' texts are wanted")
    explain: bool = Field(False, description="whether to explain how the passages were found")


class SearchesResponse(BaseModel):
    """The response to several queries, in their order."""

    api: Literal["v1"] = "v1"
    index: str
    results: list[Answer]
    took_ms: float


class DocResponse(BaseModel):
    """A passage."""

    api: Literal["v1"] = "v1"
    index: str
    docid: str
    doc: Doc


class EmbeddingsRequest(BaseModel):
    """Texts to encode, in OpenAI's form."""

    input: Annotated[str | Texts, Field(description="one text, or several")]
    model: str | None = Field(None, description="a searcher with a dual encoder; null: the first one")
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[
        int | None, Field(ge=1, description="how many of the first dimensions; null: all of them")
    ] = None


class Embedding(BaseModel):
    """A text's vector."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str = Field(description="a string: base64 of float32, little-endian")
    truncated: bool = Field(description="whether only the beginning of the text was read")


class Usage(BaseModel):
    """The number of tokens that the model read."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingsResponse(BaseModel):
    """The texts' vectors, in OpenAI's form."""

    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: Usage


class JudgedQuery(BaseModel):
    """A query of the collection with its relevant passages."""

    id: str
    text: str
    relevant: dict[str, int] = Field(description="docid -> grade")


class QueriesResponse(BaseModel):
    """A part of a split's judged queries."""

    split: str
    splits: dict[str, int] = Field(description="split -> its number of queries")
    total: int
    offset: int
    queries: list[JudgedQuery]


class SearcherInfo(BaseModel):
    """A searcher that is served."""

    name: str
    kind: str
    family: str
    collection: str | None = Field(description="its collection's name; null if its texts are not here")
    collection_fingerprint: str | None
    passages: int | None
    parameters: int | None
    beams: int | None
    dimensions: int | None
    step: int | None
    embeddings: bool = Field(description="whether /v1/embeddings has its encoder")
    fingerprint: str = Field(description="another one says that it was replaced")


class InfoResponse(BaseModel):
    """What is served."""

    searchers: list[SearcherInfo]
    opening: list[str] = Field(description="searchers that are not ready yet")
    versions: dict[str, str]
    limits: dict[str, int]


class Health(BaseModel):
    """Whether the process answers."""

    status: Literal["ok"] = "ok"
