"""Packs the JSON Schema Test Suite, which is under the MIT licence.

https://github.com/json-schema-org/JSON-Schema-Test-Suite

    pip download --no-deps --no-binary jsonschema jsonschema==4.26.0
    tar xf jsonschema-4.26.0.tar.gz
    python tests/data/json_schema_suite/pack.py jsonschema-4.26.0/json/tests/draft2020-12

Writes draft2020-12.json: each line is one schema with instances that it allows and forbids.
"""

import json
import sys
from pathlib import Path


def main() -> None:
    lines = [
        json.dumps(
            {
                "keyword": path.stem,
                "schema": group["schema"],
                "valid": [test["data"] for test in group["tests"] if test["valid"]],
                "invalid": [test["data"] for test in group["tests"] if not test["valid"]],
            },
            separators=(",", ":"),
        )
        for path in sorted(Path(sys.argv[1]).glob("*.json"))
        for group in json.loads(path.read_text("utf-8"))
    ]
    written = "[\n" + ",\n".join(lines) + "\n]\n"
    Path(__file__).with_name("draft2020-12.json").write_text(written, "utf-8")


if __name__ == "__main__":
    main()
