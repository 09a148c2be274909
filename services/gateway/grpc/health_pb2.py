"""Generated from health.proto by scripts/protos: change that file, not this one."""

from google.protobuf import descriptor_pool, message_factory

# A pool of its own: a Triton client in this process registers messages of the same names.
_POOL = descriptor_pool.DescriptorPool()
_POOL.AddSerializedFile(
    b'\n\x0chealth.proto\x12\x0egrpc'
    b'.health.v1".\n\x12Health'
    b'CheckRequest\x12\x18\n\x07serv'
    b'ice\x18\x01 \x01(\tR\x07service"\xb1'
    b'\x01\n\x13HealthCheckRespon'
    b'se\x12I\n\x06status\x18\x01 \x01(\x0e21'
    b'.grpc.health.v1.Heal'
    b'thCheckResponse.Serv'
    b'ingStatusR\x06status"O\n'
    b'\rServingStatus\x12\x0b\n\x07UN'
    b'KNOWN\x10\x00\x12\x0b\n\x07SERVING\x10\x01'
    b'\x12\x0f\n\x0bNOT_SERVING\x10\x02\x12\x13\n'
    b'\x0fSERVICE_UNKNOWN\x10\x03b\x06'
    b'proto3'
)


def _message(name):
    return message_factory.GetMessageClass(_POOL.FindMessageTypeByName(f"grpc.health.v1.{name}"))


DESCRIPTOR = _POOL.FindFileByName("health.proto")

HealthCheckRequest = _message("HealthCheckRequest")
HealthCheckResponse = _message("HealthCheckResponse")
