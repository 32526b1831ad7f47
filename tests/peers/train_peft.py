"""The peer's side of a comparison: transformers + PEFT, trained on the batches that train.py takes.

    python tests/peers/train_peft.py --task mrpc --data-dir DIR --seed 0

Same pretrained weights, examples, batches, order, optimizer and settings as `python train.py
--preset lora --schedule constant --warmup 0` with the same flags; the model, LoRA, their initial
values and the loss are transformers' and PEFT's own.
"""

import argparse
import sys
import time
from pathlib import Path

import peft
import torch
import transformers

sys.path.insert(0, str(Path(__file__).parents[2]))

from support import download, glue, hf_folder, seeds


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--task", default="mrpc")
    parser.add_argument("--data-dir")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--lora-alpha", type=float, default=16)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    task, folder = glue.TASKS[args.task], download.model_folder("minilm")
    tokenizer = hf_folder.load_tokenizer(folder, "bert", 30522)
    train, dev = (
        glue.encode(split, tokenizer, 128)[0] for split in glue.load_task(args.task, args.data_dir)
    )
    torch.manual_seed(args.seed)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        folder, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    config = peft.LoraConfig(
        r=8, lora_alpha=args.lora_alpha, target_modules=["query", "value"], task_type="SEQ_CLS"
    )
    model = peft.get_peft_model(model, config)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=args.lr, weight_decay=0.01
    )
    started = time.monotonic()
    for epoch in range(args.epochs):
        model.train()
        rng = seeds.generator(args.seed, f"order/{epoch}")
        for indices in glue.grouped_by_length(train, args.batch_size, rng):
            model(**glue.collate([train[i] for i in indices], 0, True)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        model.eval()
        predictions = []
        with torch.inference_mode():
            for indices in glue.in_order(dev, 64):
                batch = glue.collate([dev[i] for i in indices], 0, True)
                predictions += model(**batch).logits.argmax(-1).tolist()
        metrics = glue.metrics(task, predictions, [e["label"] for e in dev])
        print(f"epoch {epoch + 1}: {metrics}, {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
