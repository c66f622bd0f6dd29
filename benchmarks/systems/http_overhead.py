"""What HTTP adds to a step: a real server process against the engine in this one, same steps.

    python -m benchmarks.systems.http_overhead

The model is random and tiny, so that the rest is what is seen: encoding, the socket, uvicorn, the
thread of the engine, decoding.
"""

from cyclopts import App

from benchmarks.provenance import end
from benchmarks.systems.step_over_http import overhead_ms

app = App(help=__doc__)


@app.default
def main(*, sessions: int = 32, candidates: int = 15) -> None:
    """Measure and print one JSON line.

    Parameters
    ----------
    sessions
        Rows of a step.
    candidates
        Of each row.
    """
    times = {name: round(ms, 3) for name, ms in overhead_ms(sessions, candidates).items()}
    end({"http_overhead_ms_p50": times["tcp"], **times})


if __name__ == "__main__":
    app()
