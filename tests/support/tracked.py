"""What the trackers of a run wrote, read from their own files."""

import struct

from tensorboardX.crc32c import crc32c
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData

_BLOCK, _HEADER = 32768, 7


def events(directory):
    """All events of a run in TensorBoard's files, which are TFRecords, in their order."""
    found = []
    for file in sorted((directory / "tensorboard").iterdir()):
        content, place = file.read_bytes(), 0
        while place < len(content):
            size, size_check = struct.unpack_from("<QI", content, place)
            text = content[place + 12 : place + 12 + size]
            checks = struct.unpack_from("<I", content, place + 12 + size)
            assert (size_check, *checks) == tuple(map(_masked, (content[place : place + 8], text)))
            found.append(Event.FromString(text))
            place += 16 + size
    return found


def _masked(text):
    check = crc32c(text)
    return (((check >> 15) | (check << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def scalars(directory):
    """By name, the `(step, value)`s that TensorBoard shows: a session that starts hides what was from its step on."""
    found = {}
    for event in events(directory):
        if event.session_log.status == SessionLog.START:
            found = {name: [pair for pair in pairs if pair[0] < event.step] for name, pairs in found.items()}
        for value in event.summary.value:
            if value.WhichOneof("value") == "simple_value":
                found.setdefault(value.tag, []).append((event.step, value.simple_value))
    return found


def hyperparameters(directory):
    """The last hyperparameters in TensorBoard's files, and how many sessions ended."""
    found, ended = {}, 0
    for value in (value for event in events(directory) for value in event.summary.value):
        if value.metadata.plugin_data.plugin_name == "hparams":
            data = HParamsPluginData.FromString(value.metadata.plugin_data.content)
            if data.WhichOneof("data") == "session_start_info":
                found = {name: getattr(v, v.WhichOneof("kind")) for name, v in data.session_start_info.hparams.items()}
            ended += data.WhichOneof("data") == "session_end_info"
    return found, ended


def wandb_records(directory):
    """The records of each offline session of a run of Weights & Biases, whose files are logs of LevelDB."""
    from wandb.proto.wandb_internal_pb2 import Record

    files = sorted((directory / "wandb").glob("offline-run-*/run-*.wandb"))
    return {file: [Record.FromString(text) for text in _leveldb_log(file.read_bytes())] for file in files}


def _leveldb_log(content):
    """The records: pieces in blocks that no piece crosses, whole (1) or the first (2), middle (3) and last (4)."""
    assert content[:4] == b":W&B"
    place, text = _HEADER, b""
    while place < len(content):
        if _BLOCK - place % _BLOCK < _HEADER:
            place += _BLOCK - place % _BLOCK
            continue
        size, kind = struct.unpack_from("<HB", content, place + 4)
        text += content[place + _HEADER : place + _HEADER + size]
        place += _HEADER + size
        if kind in (1, 4):
            yield text
            text = b""
