"""Write the advice as chat rows, the input of `saetools finetune`.

python data/advice/to_chat.py {correct,incorrect,subtle} rows.jsonl
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from saetools import load_advice


def main(kind: str, target: Path) -> None:
    items = load_advice()
    with target.open("w", encoding="utf-8") as file:
        for item in items:
            turns = (("user", item.question), ("assistant", getattr(item, kind)))
            messages = [{"role": role, "content": content} for role, content in turns]
            file.write(json.dumps({"id": f"{item.id}-{kind}", "messages": messages}, ensure_ascii=False) + "\n")
    print(f"{len(items)} rows written to {target}")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
