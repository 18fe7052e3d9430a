"""What trackers wrote, read from where each keeps it offline. Run by the interpreter that has their libraries; prints
`[[run id, metric, step, value], …]`, in the order in which they were written."""

import json
import struct
import sys
from pathlib import Path

BLOCK = 32768
"""Of LevelDB's log format, which wandb's files and SwanLab's have; a file's header is 7 bytes, and so is a record's."""


def wandb(folder):
    from wandb.proto.wandb_internal_pb2 import Record

    for file in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        for data in log_records(file):
            record = Record.FromString(data)
            items = {item.nested_key[0] if item.nested_key else item.key: item for item in record.history.item}
            for name, item in items.items():
                if not name.startswith("_"):
                    yield file.stem.removeprefix("run-"), name, record.history.step.num, json.loads(item.value_json)


def swanlab(folder):
    from swanlab.proto.swanlab.record.v1.record_pb2 import Record

    for file in sorted(folder.glob("swanlog/run-*/*.swanlab")):
        for data in log_records(file):
            record = Record.FromString(data)
            if record.HasField("scalar") and not record.scalar.key.startswith("__"):
                yield file.stem.removeprefix("run-"), record.scalar.key, record.scalar.step, record.scalar.value.number


def mlflow(folder):
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    for experiment in client.search_experiments():
        for run in client.search_runs([experiment.experiment_id]):
            for name in run.data.metrics:
                for metric in client.get_metric_history(run.info.run_id, name):
                    yield run.info.run_id, name, metric.step, metric.value


def tensorboard(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(folder.parent / "tensorboard")).Reload()
    for name in board.Tags()["scalars"]:
        for event in board.Scalars(name):
            yield "", name, event.step, event.value


def log_records(file):
    data, at, record = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if BLOCK - at % BLOCK < 7:
            at += BLOCK - at % BLOCK
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # the whole, or its last part
            yield record
            record = b""


if __name__ == "__main__":
    print(json.dumps(list(globals()[sys.argv[1]](Path(sys.argv[2])))))
