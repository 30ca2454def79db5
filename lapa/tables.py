"""Tables of a run's results, to read and to compute with: CSV and JSON with all digits, Markdown with few."""

import csv
import io
import json
from dataclasses import dataclass
from pathlib import Path

from lapa.outcomes import ARM_NAMES, Outcomes, comparison_rows, pool_families, success_rows


@dataclass(frozen=True)
class Table:
    """rows: one dictionary each, all with the same keys. header and text: the same for a reader."""

    rows: list[dict]
    header: list[str]
    text: list[list[str]]

    def write(self, folder: Path, name: str, picture: bytes | None = None) -> None:
        """Write <name>.csv, .json, .md, and .png where there is a picture."""
        folder.mkdir(parents=True, exist_ok=True)
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, list(self.rows[0]) if self.rows else [], lineterminator="\n")
        writer.writeheader()
        for row in self.rows:
            writer.writerow({key: " ".join(map(str, v)) if isinstance(v, list) else v for key, v in row.items()})
        lines = [self.header, ["---"] * len(self.header), *self.text]
        markdown = "".join(f"| {' | '.join(line)} |\n" for line in lines)
        files = {"csv": buffer.getvalue().encode(), "md": markdown.encode()}
        files["json"] = (json.dumps(self.rows, indent=1) + "\n").encode()
        if picture is not None:
            files["png"] = picture
        for ending, content in files.items():
            temporary = folder / f".{name}.{ending}.tmp"
            temporary.write_bytes(content)
            temporary.replace(folder / f"{name}.{ending}")


def success_table(outcomes: Outcomes) -> Table:
    """Success of each split, family and arm."""
    rows = success_rows(outcomes)
    names = names_of(rows)
    header = ["family", "arm", "success", "95% Wilson", "95% over seeds and episodes", "by seed", "seeds x episodes"]
    text = [
        [
            names[row["split"], row["family"]],
            ARM_NAMES.get(row["arm"], row["arm"]),
            percent(row["success"]),
            f"{percent(row['wilson_low'])} to {percent(row['wilson_high'])}",
            f"{percent(row['low'])} to {percent(row['high'])}",
            ", ".join(percent(value) for value in row["by_seed"]),
            f"{row['num_seeds']} x {row['num_episodes']}",
        ]
        for row in rows
    ]
    return Table(rows, header, text)


def comparison_table(outcomes: Outcomes, baseline: str = "scratch") -> Table:
    """Differences between arms in points, and gap closures."""
    rows = comparison_rows(outcomes, baseline)
    names = names_of(rows)
    text = []
    for row in rows:
        arm, other, floor = (
            ARM_NAMES.get(row[key], row[key] or "").removesuffix(" (upper bound)") for key in ("arm", "other", "floor")
        )
        if row["kind"] == "difference":
            what = f"{arm} − {other}"
            value, between = f"{100 * row['value']:+.1f}", f"{100 * row['low']:+.1f} to {100 * row['high']:+.1f}"
        else:
            what = f"gap closure: ({arm} − {floor}) / ({other} − {floor})"
            value, between = "left out", f"{other} − {floor} is inside the noise"
            if row["value"] is not None:
                value, between = f"{row['value']:.2f}", f"{row['low']:.2f} to {row['high']:.2f}"
        text.append([names[row["split"], row["family"]], what, value, between])
    return Table(rows, ["family", "comparison", "points or ratio", "95% over seeds and episodes"], text)


def curve_table(points: dict[float, Outcomes], axis: str) -> Table:
    """Success over all families, a split, arm and point of a sweep."""
    rows = [
        {"point": point, **row} for point, outcomes in points.items() for row in success_rows(pool_families(outcomes))
    ]
    text = [
        [
            f"{row['point']:g}",
            row["split"],
            ARM_NAMES.get(row["arm"], row["arm"]),
            percent(row["success"]),
            f"{percent(row['low'])} to {percent(row['high'])}",
            f"{row['num_seeds']} x {row['num_episodes']}",
        ]
        for row in rows
    ]
    header = [axis, "split", "arm", "success", "95% over seeds and episodes", "seeds x episodes"]
    return Table(rows, header, text)


def names_of(rows: list[dict]) -> dict[tuple[str, str], str]:
    """How to call each group (split, family) of the rows."""
    groups = list(dict.fromkeys((row["split"], row["family"]) for row in rows))
    return dict(zip(groups, group_names(groups), strict=True))


def group_names(groups: list[tuple[str, str]]) -> list[str]:
    """Families to read, with their split where there are several."""
    has_splits = len({split for split, _ in groups}) > 1
    return [
        family.replace("_", " ") + (f", {split.replace('_', ' ')}" if has_splits else "") for split, family in groups
    ]


def percent(value: float) -> str:
    return f"{100 * value:.0f}%"
