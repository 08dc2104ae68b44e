"""Losses of preferences and their gradients by PyTorch, as TRL 1.16 writes them: `python make_preferences_reference.py OUT.json`.

DPO's are the lines of `DPOTrainer._compute_loss`, IPO with means over tokens; ORPO's are `ORPOTrainer.odds_ratio_loss`, minus the
mean log-likelihood of the chosen answer. With torch and trl installed.
"""

import json
import sys
import types

import torch
import torch.nn.functional as F
from trl.experimental.orpo.orpo_trainer import ORPOTrainer

BETA, PAIRS, SMOOTHING = 0.3, 7, 0.2


def losses(kind, chosen, rejected, reference_chosen, reference_rejected):
    delta = (chosen - reference_chosen) - (rejected - reference_rejected)
    if kind == "orpo":
        trainer = types.SimpleNamespace(beta=BETA, accelerator=types.SimpleNamespace(device="cpu"))
        return -chosen - ORPOTrainer.odds_ratio_loss(trainer, chosen, rejected)[0]
    return {
        "sigmoid": lambda: -F.logsigmoid(BETA * delta),
        "smoothed": lambda: -F.logsigmoid(BETA * delta) * (1 - SMOOTHING) - F.logsigmoid(-BETA * delta) * SMOOTHING,
        "hinge": lambda: torch.relu(1 - BETA * delta),
        "ipo": lambda: (delta - 1 / (2 * BETA)) ** 2,
    }[kind]()


def main(file):
    torch.manual_seed(0)
    found = {"beta": BETA, "label_smoothing": SMOOTHING, "log_p": (-(torch.rand(4, PAIRS) * 4 + 0.01)).tolist(), "kinds": {}}
    for kind in ("sigmoid", "smoothed", "hinge", "ipo", "orpo"):
        log_p = torch.tensor(found["log_p"], requires_grad=True)
        value = losses(kind, *log_p)
        value.sum().backward()
        found["kinds"][kind] = {"losses": value.tolist(), "gradients": log_p.grad[:2].tolist()}
    with open(file, "w") as stream:
        json.dump(found, stream, indent=1)


main(sys.argv[1])
