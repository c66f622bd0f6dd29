"""`lenvm doctor`: is everything there, does it fit together, and if not, what is to be done?

Each module of this package looks at one part of an installation and yields `Finding`s.
"""

import logging
import sys

from lenvm_vllm.commands.doctor import engine, environment, serving, values
from lenvm_vllm.commands.doctor.finding import Sheet


def doctor(*, model: str | None = None, vllm: str | None = None) -> None:
    """Check this environment and the value servers; exit code 1 if something is wrong.

    Parameters
    ----------
    model
        That vLLM serves, a hub name or a folder: compares its tokenizer, and tells which of
        vLLM's model runners it gets.
    vllm
        URL of a running vLLM: asks it for some tokens with and without a length. Where it has
        an API key, that of VLLM_API_KEY is sent.
    """
    logging.disable(logging.WARNING)  # what matters of vLLM's stands in the table
    sheet, wrong = Sheet(), 0
    for findings in (  # in the order in which they are worth putting right
        environment.findings(),
        engine.findings(model),
        values.findings(model),
        serving.findings(vllm),
    ):
        for finding in findings:
            sheet.show(finding)
            wrong += finding.is_wrong
    if wrong:
        sys.exit(f"{wrong} wrong")
