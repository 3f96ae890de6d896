"""A reporter for tests."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Heard:
    """A reporter that keeps what it is told."""

    lines: list[str] = field(default_factory=list)
    stages: dict[str, list[int]] = field(default_factory=dict)

    def say(self, text):
        self.lines.append(text)

    def progress(self, stage, total):
        self.stages[stage] = [0, total]

        def tick(done):
            self.stages[stage][0] += done

        return tick
