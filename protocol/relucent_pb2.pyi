from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Chunk(_message.Message):
    __slots__ = ("sequence", "last", "data")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    last: bool
    data: bytes
    def __init__(self, sequence: _Optional[int] = ..., last: _Optional[bool] = ..., data: _Optional[bytes] = ...) -> None: ...

class Empty(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Offer(_message.Message):
    __slots__ = ("protocol_version", "model_id", "registration_id", "delta_id", "delta_bytes", "public_bytes", "max_batch", "name", "mask_id")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    REGISTRATION_ID_FIELD_NUMBER: _ClassVar[int]
    DELTA_ID_FIELD_NUMBER: _ClassVar[int]
    DELTA_BYTES_FIELD_NUMBER: _ClassVar[int]
    PUBLIC_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_BATCH_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    MASK_ID_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    model_id: str
    registration_id: bytes
    delta_id: bytes
    delta_bytes: int
    public_bytes: int
    max_batch: int
    name: str
    mask_id: bytes
    def __init__(self, protocol_version: _Optional[int] = ..., model_id: _Optional[str] = ..., registration_id: _Optional[bytes] = ..., delta_id: _Optional[bytes] = ..., delta_bytes: _Optional[int] = ..., public_bytes: _Optional[int] = ..., max_batch: _Optional[int] = ..., name: _Optional[str] = ..., mask_id: _Optional[bytes] = ...) -> None: ...

class DescribeRequest(_message.Message):
    __slots__ = ("protocol_version", "name")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    name: str
    def __init__(self, protocol_version: _Optional[int] = ..., name: _Optional[str] = ...) -> None: ...

class ListRequest(_message.Message):
    __slots__ = ("protocol_version",)
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    def __init__(self, protocol_version: _Optional[int] = ...) -> None: ...

class ModelEntry(_message.Message):
    __slots__ = ("name", "model_id", "relus", "classes", "input_shape")
    NAME_FIELD_NUMBER: _ClassVar[int]
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    RELUS_FIELD_NUMBER: _ClassVar[int]
    CLASSES_FIELD_NUMBER: _ClassVar[int]
    INPUT_SHAPE_FIELD_NUMBER: _ClassVar[int]
    name: str
    model_id: str
    relus: int
    classes: int
    input_shape: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, name: _Optional[str] = ..., model_id: _Optional[str] = ..., relus: _Optional[int] = ..., classes: _Optional[int] = ..., input_shape: _Optional[_Iterable[int]] = ...) -> None: ...

class ModelList(_message.Message):
    __slots__ = ("models",)
    MODELS_FIELD_NUMBER: _ClassVar[int]
    models: _containers.RepeatedCompositeFieldContainer[ModelEntry]
    def __init__(self, models: _Optional[_Iterable[_Union[ModelEntry, _Mapping]]] = ...) -> None: ...

class FetchRequest(_message.Message):
    __slots__ = ("protocol_version", "model_id", "delta_id", "offset")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    DELTA_ID_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    model_id: str
    delta_id: bytes
    offset: int
    def __init__(self, protocol_version: _Optional[int] = ..., model_id: _Optional[str] = ..., delta_id: _Optional[bytes] = ..., offset: _Optional[int] = ...) -> None: ...

class PreprocessOpen(_message.Message):
    __slots__ = ("protocol_version", "model_id", "delta_id", "batch", "client_id", "timeline")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    DELTA_ID_FIELD_NUMBER: _ClassVar[int]
    BATCH_FIELD_NUMBER: _ClassVar[int]
    CLIENT_ID_FIELD_NUMBER: _ClassVar[int]
    TIMELINE_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    model_id: str
    delta_id: bytes
    batch: int
    client_id: bytes
    timeline: bool
    def __init__(self, protocol_version: _Optional[int] = ..., model_id: _Optional[str] = ..., delta_id: _Optional[bytes] = ..., batch: _Optional[int] = ..., client_id: _Optional[bytes] = ..., timeline: _Optional[bool] = ...) -> None: ...

class PreprocessUp(_message.Message):
    __slots__ = ("open", "chunk")
    OPEN_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    open: PreprocessOpen
    chunk: Chunk
    def __init__(self, open: _Optional[_Union[PreprocessOpen, _Mapping]] = ..., chunk: _Optional[_Union[Chunk, _Mapping]] = ...) -> None: ...

class Ready(_message.Message):
    __slots__ = ("dealer_bytes", "lifetime_s", "holder")
    DEALER_BYTES_FIELD_NUMBER: _ClassVar[int]
    LIFETIME_S_FIELD_NUMBER: _ClassVar[int]
    HOLDER_FIELD_NUMBER: _ClassVar[int]
    dealer_bytes: int
    lifetime_s: float
    holder: bytes
    def __init__(self, dealer_bytes: _Optional[int] = ..., lifetime_s: _Optional[float] = ..., holder: _Optional[bytes] = ...) -> None: ...

class PreprocessDown(_message.Message):
    __slots__ = ("material_id", "ready")
    MATERIAL_ID_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    material_id: bytes
    ready: Ready
    def __init__(self, material_id: _Optional[bytes] = ..., ready: _Optional[_Union[Ready, _Mapping]] = ...) -> None: ...

class InferOpen(_message.Message):
    __slots__ = ("protocol_version", "model_id", "material_id", "client_secret", "timeline")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    MATERIAL_ID_FIELD_NUMBER: _ClassVar[int]
    CLIENT_SECRET_FIELD_NUMBER: _ClassVar[int]
    TIMELINE_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    model_id: str
    material_id: bytes
    client_secret: bytes
    timeline: bool
    def __init__(self, protocol_version: _Optional[int] = ..., model_id: _Optional[str] = ..., material_id: _Optional[bytes] = ..., client_secret: _Optional[bytes] = ..., timeline: _Optional[bool] = ...) -> None: ...

class InferUp(_message.Message):
    __slots__ = ("open", "chunk")
    OPEN_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    open: InferOpen
    chunk: Chunk
    def __init__(self, open: _Optional[_Union[InferOpen, _Mapping]] = ..., chunk: _Optional[_Union[Chunk, _Mapping]] = ...) -> None: ...

class DiscardRequest(_message.Message):
    __slots__ = ("material_ids", "client_secrets")
    MATERIAL_IDS_FIELD_NUMBER: _ClassVar[int]
    CLIENT_SECRETS_FIELD_NUMBER: _ClassVar[int]
    material_ids: _containers.RepeatedScalarFieldContainer[bytes]
    client_secrets: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, material_ids: _Optional[_Iterable[bytes]] = ..., client_secrets: _Optional[_Iterable[bytes]] = ...) -> None: ...

class RegisterOpen(_message.Message):
    __slots__ = ("protocol_version", "model_id", "registration_secret", "public_bytes")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    REGISTRATION_SECRET_FIELD_NUMBER: _ClassVar[int]
    PUBLIC_BYTES_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    model_id: str
    registration_secret: bytes
    public_bytes: int
    def __init__(self, protocol_version: _Optional[int] = ..., model_id: _Optional[str] = ..., registration_secret: _Optional[bytes] = ..., public_bytes: _Optional[int] = ...) -> None: ...

class RegisterUp(_message.Message):
    __slots__ = ("open", "chunk")
    OPEN_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    open: RegisterOpen
    chunk: Chunk
    def __init__(self, open: _Optional[_Union[RegisterOpen, _Mapping]] = ..., chunk: _Optional[_Union[Chunk, _Mapping]] = ...) -> None: ...

class Registration(_message.Message):
    __slots__ = ("weight_mask_seed",)
    WEIGHT_MASK_SEED_FIELD_NUMBER: _ClassVar[int]
    weight_mask_seed: bytes
    def __init__(self, weight_mask_seed: _Optional[bytes] = ...) -> None: ...

class MaterialRequest(_message.Message):
    __slots__ = ("protocol_version", "model_id", "registration_id", "material_id", "client_id", "batch", "registration_secret", "client_secret", "mask_id", "timeline")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    REGISTRATION_ID_FIELD_NUMBER: _ClassVar[int]
    MATERIAL_ID_FIELD_NUMBER: _ClassVar[int]
    CLIENT_ID_FIELD_NUMBER: _ClassVar[int]
    BATCH_FIELD_NUMBER: _ClassVar[int]
    REGISTRATION_SECRET_FIELD_NUMBER: _ClassVar[int]
    CLIENT_SECRET_FIELD_NUMBER: _ClassVar[int]
    MASK_ID_FIELD_NUMBER: _ClassVar[int]
    TIMELINE_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    model_id: str
    registration_id: bytes
    material_id: bytes
    client_id: bytes
    batch: int
    registration_secret: bytes
    client_secret: bytes
    mask_id: bytes
    timeline: bool
    def __init__(self, protocol_version: _Optional[int] = ..., model_id: _Optional[str] = ..., registration_id: _Optional[bytes] = ..., material_id: _Optional[bytes] = ..., client_id: _Optional[bytes] = ..., batch: _Optional[int] = ..., registration_secret: _Optional[bytes] = ..., client_secret: _Optional[bytes] = ..., mask_id: _Optional[bytes] = ..., timeline: _Optional[bool] = ...) -> None: ...

class MaterialDown(_message.Message):
    __slots__ = ("seed", "chunk")
    SEED_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    seed: bytes
    chunk: Chunk
    def __init__(self, seed: _Optional[bytes] = ..., chunk: _Optional[_Union[Chunk, _Mapping]] = ...) -> None: ...
