"""What a causal model writes, as it comes: python tools/generate.py --run RUN "prompt"

    --run DIR         the model of a run, with what the run trained
    --model NAME      a model as it is (minilm's kind cannot write): a name, folder or GGUF file
    --no-adapter      the model of the run without what the run trained: what training did
    --plain           the prompt as it is; else it is asked as the run was trained to be asked (of a
                      text task: a meaning representation, an instruction), or in the model's chat
                      template, where it has one

What this file does not do: choose tokens (support/generation.py), keep a conversation, notice that
the folder of the run's model holds other weights now (train.py --resume does).
"""

import argparse
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import lora  # noqa: E402
from model import load_pretrained  # noqa: E402
from relatives import METHODS  # noqa: E402
from support import download, generation, glue, prompts, run_folder, seeds, texts  # noqa: E402
from support.errors import one_line  # noqa: E402
from support.flags import Parser  # noqa: E402


def load(args):
    """(model in eval mode, tokenizer, form and ends as in prompts.py, the task's name)."""
    flags = run_folder.read_config(args.run) if args.run else {"model": args.model}
    name = flags.get("model")
    if not isinstance(name, str):
        raise ValueError(f"{args.run}/config.json names no model: not a run of train.py")
    task = flags.get("task")
    if args.run and not args.no_adapter and task in glue.TASKS:
        raise ValueError(
            f"{args.run} was trained on {task}, to classify, and writes no text: --no-adapter asks "
            "its model alone"
        )
    how = {key: flags[key] for key in ("shortcut_norm", "base_dtype") if key in flags}
    model, tokenizer = load_pretrained(name, head="lm", **how)
    if args.run and not args.no_adapter:
        kind = METHODS["adapter"].get(str(flags.get("adapter")), lora.LoRALayer)
        lora.load_adapter(model, args.run, adapter=kind)
    form, specials = prompts.read_form(download.model_folder(name))
    ends = prompts.ends_of(tokenizer, model.config.eos_token_ids, specials)
    return model.eval(), tokenizer, form, ends, str(task)


def ids_of(args, tokenizer, form, ends, task):
    """The tokens of the prompt: as the run was trained, else in the chat template, or as it is.

    Raises:
        ValueError: the template fails, or nothing is left.
    """
    if args.plain or task not in texts.TASKS:
        ids = prompts.ids_of(tokenizer, args.prompt, None if args.plain else form, ends)
    else:
        ids = texts.prompt_ids(task, args.prompt, tokenizer, form, ends)
    if not ids:
        raise ValueError("the prompt is empty: give at least one word")
    return ids


def pieces(tokenizer, tokens, eos_token_ids):
    """Yields the text of new tokens up to the end, piece by piece; joined they are all of it.

    A character that is cut between two tokens waits for the second.
    """
    ids, said = [], ""
    for token in tokens:
        if token in eos_token_ids:
            break
        ids.append(token)
        text = tokenizer.decode(ids)
        if not text.endswith("�"):
            yield text[len(said) :]
            said = text
    yield tokenizer.decode(ids)[len(said) :]


def write(args):
    """Print what the model writes. ValueError or OSError on bad input."""
    model, tokenizer, form, ends, task = load(args)
    ids = ids_of(args, tokenizer, form, ends, task)
    prompt = torch.tensor([ids])  # (1, t)
    limit = min(args.max_new_tokens, model.config.max_positions - len(ids))
    if limit < 1 <= args.max_new_tokens:
        most = model.config.max_positions - 1
        raise ValueError(f"the prompt has {len(ids)} tokens, allowed: {most} at most")
    ends_at = model.config.eos_token_ids
    if args.num_beams > 1:
        how = {"num_beams": args.num_beams, "length_penalty": args.length_penalty}
        best = model.generate(prompt, limit, **how)[0].tolist()
        print("".join(pieces(tokenizer, best, ends_at)))
        return
    rng = seeds.generator(args.seed or 0, "generation") if args.temperature else None
    new = generation.stream(model, prompt, limit, None, args.temperature, args.top_p, generator=rng)
    for piece in pieces(tokenizer, (token.item() for token in new), ends_at):
        print(piece, end="", flush=True)
    print()


def main(argv=None):
    """Exit code: 0 done, 2 bad input, 130 interrupted."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", help="run folder")
    source.add_argument("--model", help="smollm2, smollm2-q4, a folder, a .gguf file or a hub id")
    parser.add_argument("--no-adapter", action="store_true", help="without what the run trained")
    parser.add_argument("--plain", action="store_true", help="the prompt as it is")
    parser.add_argument("--max-new-tokens", type=int, default=100, help="default 100")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 = greedy, the default")
    parser.add_argument("--top-p", type=float, default=1.0, help="the nucleus, default 1 = all")
    parser.add_argument("--seed", type=int, help="of what is sampled, default 0")
    parser.add_argument("--num-beams", type=int, default=1, help="more than 1: beam search")
    parser.add_argument("--length-penalty", type=float, default=1.0, help="of beams, default 1")
    try:
        args = parser.parse_args(argv)
        if args.no_adapter and not args.run:
            raise ValueError("--no-adapter needs --run DIR: --model has no adapter")
        if texts.has_half_a_character(args.prompt):
            raise ValueError("the prompt is no UTF-8: write it in that encoding")
        if args.num_beams < 1:
            raise ValueError(f"--num-beams is {args.num_beams}, allowed: 1 or more")
        if args.seed is not None and not args.temperature:
            raise ValueError("--seed does nothing without --temperature: nothing is sampled")
        if args.num_beams != 1 and (args.temperature or args.top_p != 1):
            raise ValueError("--num-beams beside --temperature or --top-p: beams are not sampled")
        if args.num_beams == 1 and args.length_penalty != 1:
            raise ValueError("--length-penalty does nothing without --num-beams")
        write(args)
    except (ValueError, OSError) as error:
        print(f"generate.py: {one_line(error, 600)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print()
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
