"""KubeRay's CRDs, small enough to keep: `python -m tests.deploy.crds FOLDER` makes `kuberay_1_7.json` of the three
files of FOLDER, `ray.io_rayclusters.yaml` and so on, as KubeRay 1.7.0 has them under `ray-operator/config/crd/bases`.

Of each the schema of `v1` is kept, without descriptions, defaults, status and rules in CEL, and what occurs several
times, such as the template of a pod, once.
"""

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import jsonschema
import yaml

KINDS = {"RayCluster": "rayclusters", "RayJob": "rayjobs", "RayService": "rayservices"}
FIXTURE = Path(__file__).parent / "kuberay_1_7.json"
LEFT_OUT = ("description", "default", "format")
SHORT = 150
"""Characters of a schema below which it is written out each time."""


def schema(text: str) -> dict[str, Any]:
    """What a CRD says of version v1, as a JSON schema that knows no other fields: so the API server reads it too, which
    drops them or, of `kubectl apply`, refuses them."""
    versions = yaml.load(text, Loader=yaml.CSafeLoader)["spec"]["versions"]
    (found,) = [each["schema"]["openAPIV3Schema"] for each in versions if each["name"] == "v1"]
    found["properties"].pop("status")
    cleaned: dict[str, Any] = _cleaned(found)
    return cleaned


def _cleaned(node: Any) -> Any:
    kept = {name: value for name, value in node.items() if name not in LEFT_OUT and not name.startswith("x-kubernetes")}
    for name in ("items", "additionalProperties"):
        if isinstance(kept.get(name), dict):
            kept[name] = _cleaned(kept[name])
    if "properties" in kept:
        kept["properties"] = {name: _cleaned(value) for name, value in kept["properties"].items()}
        if not node.get("x-kubernetes-preserve-unknown-fields"):
            kept["additionalProperties"] = False
    return kept


def fixture(schemas: dict[str, Any]) -> str:
    """The schemas in one text, what occurs several times once."""
    times: Counter[str] = Counter()

    def count(node: Any) -> None:
        if isinstance(node, dict):
            text = json.dumps(node, sort_keys=True)
            times[text] += len(text) > SHORT
            if times[text] <= 1:
                for value in node.values():
                    count(value)

    def shared(node: Any, *, itself: bool = False) -> Any:
        if not isinstance(node, dict):
            return node
        text = json.dumps(node, sort_keys=True)
        if text in names and not itself:
            return {"$ref": f"#/$defs/{names[text]}"}
        return {name: shared(value) for name, value in node.items()}

    count(schemas)
    names = {text: str(i) for i, text in enumerate(text for text in times if times[text] > 1)}
    defined = {name: shared(json.loads(text), itself=True) for text, name in names.items()}
    parts = {**{kind: shared(each) for kind, each in schemas.items()}, "$defs": defined}
    lines = [
        f"{json.dumps(name)}:{json.dumps(part, sort_keys=True, separators=(',', ':'))}" for name, part in parts.items()
    ]
    return "{" + ",\n".join(lines) + "}\n"


def faults(manifest: dict[str, Any], schemas: dict[str, Any]) -> list[str]:
    """What is wrong with a manifest, each with the place. schemas: as the fixture has them."""
    checked = {**schemas[manifest["kind"]], "$defs": schemas["$defs"]}
    found = jsonschema.Draft202012Validator(checked).iter_errors(manifest)
    return [f"{error.json_path}: {error.message}" for error in found]


def of_folder(folder: Path) -> dict[str, Any]:
    """The schemas of a folder's CRDs, by kind."""
    return {kind: schema((folder / f"ray.io_{file}.yaml").read_text()) for kind, file in KINDS.items()}


if __name__ == "__main__":
    FIXTURE.write_text(fixture(of_folder(Path(sys.argv[1]))))
