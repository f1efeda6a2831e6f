"""A guard around a press in three lines, and what it did.

    python examples/quickstart.py                                     # SmolLM2-135M from the hub
    python examples/quickstart.py --model results/checkpoints/smollm2-135m    # as the demo left it

The guard needs no training here: ``predictor="rules"`` reads a risk from repetition and entropy. A
predictor that the pipeline trained is given by its path, ``results/models/hazard_predictor.json``.
"""

import argparse

import torch
from kvpress import SnapKVPress
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvguard import KVGuard

FACTS = "".join(
    f"The code for {colour} {animal} is {4000 + 37 * number}.\n"
    for number, (colour, animal) in enumerate(
        (colour, animal)
        for animal in ("otter", "heron", "camel", "gecko")
        for colour in ("amber", "green", "white")
    )
)
QUESTION = FACTS + "What is the code for green heron? Answer with one short sentence."


def main(model_name: str, max_new_tokens: int = 64) -> str:
    """Answer one question under heavy compression, guarded; return the answer."""
    tokenizer = AutoTokenizer.from_pretrained(model_name)
    model = AutoModelForCausalLM.from_pretrained(model_name, dtype=torch.float32)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}], tokenize=False, add_generation_prompt=True
    )
    inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False)

    guard = KVGuard(press=SnapKVPress(0.75, window_size=16), predictor="rules")
    output = model.generate(
        **inputs, custom_generate=guard, do_sample=False, max_new_tokens=max_new_tokens
    )

    answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    print(answer)
    print(guard.report)
    print(repr(guard.report[0]))
    return answer


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    main(parser.parse_args().model)
