"""The Open Inference Protocol v2: infer requests and responses, JSON and binary extension.

A body is a JSON header and then, with the binary extension, raw tensors in the order in which
the header lists them; the header's length travels beside the body (`names.HEADER_LENGTH`). The
same bytes travel over HTTP and AMQP. What comes from outside is met with suspicion: whatever
the bytes are, decoding gives a value, `InvalidRequest` or `TooLarge`, in bounded memory.
"""

from shared.v2.check import check_inputs
from shared.v2.decode import decode_request, decode_response, raw_input_of
from shared.v2.encode import encode_request, encode_response, error_body
from shared.v2.messages import (
    DEFAULT,
    InferRequest,
    InferResponse,
    Limits,
    RequestedOutput,
    error_message,
    message_priority,
    parse_header_length,
    priority,
    priority_level,
    timeout_us,
)

__all__ = [
    "DEFAULT",
    "InferRequest",
    "InferResponse",
    "Limits",
    "RequestedOutput",
    "check_inputs",
    "decode_request",
    "decode_response",
    "encode_request",
    "encode_response",
    "error_body",
    "error_message",
    "message_priority",
    "parse_header_length",
    "priority",
    "priority_level",
    "raw_input_of",
    "timeout_us",
]
