"""The peer of `peers.py` in PyTorch with PEFT: takes a step for each line that it reads, and writes its loss and times.

Runs where torch, transformers and peft are, without JAX: `python peers_torch.py DIRECTORY`, which `peers.py` makes.
"""

import json
import pathlib
import sys
import time

import peft
import safetensors.torch
import torch
import transformers


class Classifier(torch.nn.Module):
    """A BERT and a head that reads the mean of its hidden states, as sentence models pool."""

    def __init__(self, config):
        super().__init__()
        self.bert = transformers.BertModel(config, add_pooling_layer=False)
        self.classifier = torch.nn.Linear(config.hidden_size, config.num_labels)

    def forward(self, input_ids, labels):
        hidden = self.bert(input_ids).last_hidden_state
        return torch.nn.functional.cross_entropy(self.classifier(hidden.mean(1)), labels)


def build(directory):
    """The model with its adapters, and a function of the batch that gives the loss."""
    config = transformers.AutoConfig.from_pretrained(directory)
    if config.model_type == "bert":
        config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
        model = Classifier(config)
        weights = safetensors.torch.load_file(directory / "model.safetensors")
        missing = model.load_state_dict(weights, strict=False).missing_keys
        assert not [name for name in missing if "position_ids" not in name], missing
        loss = lambda model, batch: model(**batch)
    else:
        model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        # The library shifts the labels itself.
        loss = lambda model, batch: model(input_ids=batch["input_ids"], labels=batch["input_ids"], use_cache=False).loss
    return peft.PeftModel.from_pretrained(model, directory / "adapters", is_trainable=True), loss


def main(directory):
    batch = {name: array.long() for name, array in safetensors.torch.load_file(directory / "batch.safetensors").items()}
    model, loss = build(directory)
    model.train()
    # optax.adamw's settings; PyTorch's own decay would be 0.01.
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-4)
    for _ in sys.stdin:
        wall, cpu = time.perf_counter(), time.process_time()
        optimizer.zero_grad(set_to_none=True)
        value = loss(model, batch)
        value.backward()
        optimizer.step()
        times = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
        print(json.dumps({"loss": value.item(), **times}), flush=True)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
