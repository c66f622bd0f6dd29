"""Write a model in a GGUF file as an ordinary checkpoint: bf16 safetensors, tokenizer, template.

The weights are de-quantised by transformers, with the `gguf` package. Needs no model hub.

    python scripts/from_gguf.py FILE.gguf OUT_DIR
    python scripts/from_gguf.py FILE.gguf OUT_DIR --end '<|im_end|>' '<|endoftext|>'
"""

import json
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

from value_server.contract.checkpoint import make_readable


def convert(gguf: Path, out: Path, ends: Sequence[str] = ()) -> None:
    """Write `gguf` to the folder `out`.

    ends: the tokens that end a completion, the end of turn first; by default the one that the
    file names. Raises ValueError naming a token that the tokenizer does not have.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    for token in ends:
        if token not in tokenizer.get_vocab():
            raise ValueError(f"end: {token!r}, not a token of {gguf.name}")
    tokenizer.eos_token = [*ends, tokenizer.eos_token][0]
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    quantised = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    facts = quantised.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "architectures", "transformers_version"):
        facts.pop(key, None)
    # A clean config: transformers refuses to save a model flagged as GGUF.
    config = AutoConfig.for_model(**facts)
    config.eos_token_id = tokenizer.eos_token_id
    config.pad_token_id = tokenizer.pad_token_id
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(quantised.state_dict())
    if len(ends) > 1:
        model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids(list(ends))
    model.to(torch.bfloat16).save_pretrained(out)
    make_readable(out)
    tokenizer.save_pretrained(out)


def main() -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--end", nargs="+", default=(), help="tokens that end a completion")
    args = parser.parse_args()
    convert(args.file, args.out, args.end)
    print(json.dumps({"model": str(args.out)}))


if __name__ == "__main__":
    main()
