"""What grpo.py measures, in TRL's GRPOTrainer (1.16 or later), or below in any training loop.

    from in_trl import MeasuredGRPOTrainer  # with in_trl.py and grpo.py on PYTHONPATH
    trainer = MeasuredGRPOTrainer(..., measure_every=10)  # else like GRPOTrainer; trains the same

Every 10 steps, unless a step reuses older samples, TRL's log gets these under `measure/`, whatever
scale_rewards is. Of the gradients of the prompts' expected rewards: the mean norm, the cosine freed
of sampling noise (cos_signal), interference, signal_share, and what else gradient_geometry returns.
Of the step, if advantages were not divided (_none), or by standard deviation (_std) or variance
(_var): a prompt's gain in reward (progress_...) and the step's length (length_...). A learning rate
gives a step any length: compare progress / length, of sums over many steps. Both are left out with
optimizers other than SGD and AdamW (from its second step on), with beta, and with a loss_type that
is no plain sum over tokens. output_dir/prompts.jsonl has each prompt's values. A measured step
takes twice its time (more if the model is tiny), and memory for four more gradients. Data parallel
training works; sharded parameters (FSDP, ZeRO-3) and images do not. No score at all counts as 0.

Without TRL, before the optimizer's step. In: model (no dropout); prompts, P lists of tokens;
completions, G such lists for each, end token included; rewards [P, G]; the temperature at which
this very model sampled; optimizer, torch's SGD or AdamW with one group of parameters. Out: values
to log, and columns [P]. Progress is of a loss that sums over tokens and averages over completions.
For a large model keep only count_sketch of each gradient, and of root * gradient for progress.

    import torch
    from grpo import advantage_scale, gradient_geometry, group_advantages, progress, step_diagonal
    P, G = rewards.shape
    advantages = group_advantages(rewards, "none") * G / (G - 1)  # leave-one-out, NOT divided
    parameters = [x for x in model.parameters() if x.requires_grad]
    vectors = []
    for p in range(P):
        for half in torch.arange(G).tensor_split(2):
            mean = 0.0
            for g in half.tolist():
                n = len(completions[p][g])
                tokens = torch.tensor([prompts[p] + completions[p][g]], device=model.device)
                logits = model(tokens).logits[0, -n - 1 : -1].float() / temperature
                logprobs = logits.log_softmax(dim=1).gather(1, tokens[0, -n:, None])
                mean = mean + advantages[p, g] * logprobs.sum() / len(half)
            gradient = torch.autograd.grad(mean, parameters, materialize_grads=True)
            vectors.append(torch.cat([x.flatten() for x in gradient]).cpu().double())
    A, B = torch.stack(vectors[::2]), torch.stack(vectors[1::2])  # [P, D]
    values, columns = gradient_geometry(A, B, G)
    if diagonal := step_diagonal(optimizer, parameters):  # AdamW has none before its first step
        root = torch.cat([d.flatten() for d in diagonal]).cpu().double().sqrt()
        A, B = A * root, B * root
        for norm in ("none", "std", "var"):
            scale = advantage_scale(rewards, norm)[:, 0].cpu().double()
            gains, length = progress(A @ A.T, A @ B.T, B @ B.T, G, scale)
            lr = optimizer.param_groups[0]["lr"]
            columns[f"progress_{norm}"] = (lr * gains).tolist()  # [P, 2]
            values[f"length_{norm}"] = float(lr * length)
"""

import pandas as pd
import torch
from trl import GRPOTrainer

import grpo


class MeasuredGRPOTrainer(GRPOTrainer):
    """A GRPOTrainer that measures the prompts' gradients every `measure_every` steps."""

    def __init__(self, *args, measure_every=10, **named):
        super().__init__(*args, **named)
        self.measure_every = measure_every

    def _calculate_rewards(self, *args):
        found = super()._calculate_rewards(*args)  # [completions of all processes, functions]
        self.rewards = (found * self.reward_weights.to(found)).nansum(dim=1).double().cpu()
        return found

    def _generate_and_score_completions(self, inputs):
        batch = super()._generate_and_score_completions(inputs)
        step = self.state.global_step
        if self.model.training and step % self.measure_every == 0:
            values, columns = self.measure(batch)
            for name, value in values.items():
                self._metrics["train"][f"measure/{name}"].append(float(value))
            prompts = grpo.gather([x["prompt"] for x in inputs[:: self.num_generations]])
            lines = pd.DataFrame({"step": step, "prompt": prompts} | columns)
            if grpo.is_first():
                path = f"{self.args.output_dir}/prompts.jsonl"
                lines.to_json(path, orient="records", lines=True, mode="a")
        return batch

    def measure(self, batch):
        """Values to log, and columns [P] of all processes' prompts. batch: this one's, by group."""
        G = self.num_generations
        rewards = self.rewards.view(-1, G)  # [P, G], of all processes
        mine = rewards[grpo.share(len(rewards))]  # [P', G]
        if mine.numel() != len(batch["completion_ids"]) or "pixel_values" in batch:
            raise NotImplementedError("a group on several processes, or a prompt with images")
        advantages = (grpo.group_advantages(mine, "none") * G / (G - 1)).flatten()
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
        mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
        sampled = batch.get("tool_mask", batch["completion_mask"])  # [P'G, T]: by the model
        parameters = [x for x in self.model.parameters() if x.requires_grad]
        count = sum(x.numel() for x in parameters)
        size = grpo.SKETCH if count > grpo.SMALL else count  # so long, a sketch is exact
        stream = torch.Generator(ids.device).manual_seed(0)
        signs = torch.randint(2, (count,), generator=stream, device=ids.device, dtype=torch.int8)
        scales = [signs * 2 - 1]
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)  # accelerate wraps it
        diagonal = grpo.step_diagonal(optimizer, parameters)
        if diagonal and not self.beta and self.loss_type in ("dapo", "dr_grpo", "bnpo", "cispo"):
            scales.append(scales[0] * torch.cat([x.flatten().float() for x in diagonal]).sqrt())
        halves = []
        for half in torch.arange(mine.numel()).split([(G + 1) // 2, G // 2] * len(mine)):
            gradient = [torch.zeros_like(x, dtype=torch.float32) for x in parameters]
            for i in half.split(self.args.per_device_train_batch_size):
                if advantages[i].any():
                    rows = ids[i], mask[i], sampled.shape[1]
                    logprobs, *_ = self._get_per_token_logps_and_entropies(self.model, *rows)
                    sums = (logprobs * sampled[i]).sum(dim=1)
                    mean = sums @ advantages[i].to(sums) / len(half)
                    more = torch.autograd.grad(mean, parameters, materialize_grads=True)
                    gradient = [x + y for x, y in zip(gradient, more)]
            halves.append(torch.stack([grpo.count_sketch(gradient, x, size).cpu() for x in scales]))
        plain, *scaled = torch.stack(grpo.gather(halves)).double().unbind(dim=1)  # [2P, size] each
        values, columns = grpo.gradient_geometry(plain[::2], plain[1::2], G)
        if scaled:
            A, B = scaled[0][::2], scaled[0][1::2]
            lr = self.optimizer.param_groups[0]["lr"]
            for norm in ("none", "std", "var"):
                scale = grpo.advantage_scale(rewards, norm)[:, 0]
                learnt, length = grpo.progress(A @ A.T, A @ B.T, B @ B.T, G, scale)
                columns[f"progress_{norm}"] = lr * learnt
                values[f"length_{norm}"] = lr * length
        values |= {name: x.mean() for name, x in columns.items()}
        rates = [grpo.pass_rates(half) for half in rewards.tensor_split(2, dim=1)]
        columns["pass_rate_half"] = torch.stack(rates, dim=1)
        return values, {name: x.tolist() for name, x in columns.items()}
