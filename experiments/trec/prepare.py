"""Write the TREC questions (Li and Roth 2002) as tables of a text and one of six classes.

    python -m experiments.trec.prepare SOURCE OUT

SOURCE holds TREC.train and TREC.test as they are published: ISO 8859-1, a line ``NUM:date When was … ?`` per question. OUT
receives train.tsv (5,452 questions) and test.tsv (500), with the columns text and label; the label is the coarse class.
"""

import argparse
import csv
import sys
from pathlib import Path


def prepare(source: Path, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for part in ("train", "test"):
        file = source / f"TREC.{part}"
        if not file.is_file():
            sys.exit(f"error: {file} does not exist; SOURCE must hold TREC.train and TREC.test")
        questions = [line.partition(" ") for line in file.read_text(encoding="iso-8859-1").splitlines()]
        with (out / f"{part}.tsv").open("w", encoding="utf-8", newline="") as table:
            writer = csv.writer(table, delimiter="\t", lineterminator="\n")
            writer.writerow(("text", "label"))
            writer.writerows((text, label.partition(":")[0]) for label, _, text in questions)
        print(f"{part}.tsv: {len(questions)} questions")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write the TREC questions as tables.")
    parser.add_argument("source", type=Path, help="folder with TREC.train and TREC.test")
    parser.add_argument("out", type=Path, help="folder for train.tsv and test.tsv")
    arguments = parser.parse_args()
    prepare(arguments.source, arguments.out)
