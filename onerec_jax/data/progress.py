"""How far a long read is."""

import time

import rich.console


class Progress:
    """One line that says how far a long read is: live on a terminal, else every ten seconds."""

    def __init__(self, console: rich.console.Console):
        self.console, self.stage = console, ""
        self.status = console.status("reading")

    def __enter__(self) -> "Progress":
        self.status.start()
        return self

    def __exit__(self, *_) -> None:
        self.status.stop()

    def __call__(self, stage: str, done: int, total: int, rows: int) -> None:
        now = time.perf_counter()
        if stage != self.stage:
            self.stage, self.started, self.said = stage, now, now
        seconds = max(now - self.started, 1e-3)
        rate = f"{done / 1e6 / seconds:,.0f} MB/s, " if stage == "reading" else ""
        line = f"{stage}: {rows:,} rows, {done / total:.0%}, {rate}{rows / seconds:,.0f} rows/s"
        if self.console.is_terminal:
            self.status.update(line)
        elif now - self.said >= 10:
            self.said = now
            self.console.print(line)
