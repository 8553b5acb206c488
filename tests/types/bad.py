"""What a type checker must refuse: exactly the lines that end in `# error`. It is checked and never run."""

import torch
from torch import nn

import fastreg as fr
from fastreg.integrations.lightning import EarlyStopping as LightningStopping

model = nn.Linear(784, 10)
x, y = torch.rand(32, 784), torch.randint(10, (32,))

# Choices that do not exist.
fr.optim.SGD(model.parameters(), l1_mode="soft")  # error
fr.fgsm(model, x, y, 0.1, norm="l1")  # error
fr.optim.AdamW(model.parameters(), l1_mode="soft")  # error
fr.optim.AdamW(model.parameters(), ema="0.9")  # error
fr.optim.prior_scale(0.1, "cauchy")  # error
fr.EarlyStopping(model, mode="lowest")  # error
fr.EarlyStopping(model, nan="ignore")  # error
fr.MultiTaskLoss({"digit": "ranking"})  # error

# Arguments of the wrong kind.
fr.fgsm(model, x, y, "0.1")  # error
fr.fgsm(model, x, y, 0.1, bounds=1.0)  # error
fr.fgsm(model, x, y, 0.1, bounds=(0.0, 0.5, 1.0))  # error
fr.fgsm(model, x, y, 0.1, loss="cross_entropy")  # error
fr.adversarial_loss(model, x, y, 0.1, loss=lambda output, target: 0.5)  # error
fr.adversarial_loss(model, x, y, 0.1, loss=lambda output: output.sum())  # error
fr.adversarial_loss(model, x, y, 0.1, generator=0)  # error
fr.fgsm_step(x, x, 0.1, bounds=0.5)  # error
fr.FreeAdversarial(0.1, replays=0.5)  # error
fr.robust_accuracy(model, 3, 0.1)  # error
fr.optim.penalty_groups(model, l1="1e-5")  # error
fr.EarlyStopping(model, patience="5")  # error
fr.EarlyStopping(model).step("0.5")  # error
fr.pretrain_autoencoder(lambda z: z, x)  # error
fr.share_parameters(model, 0)  # error

# Extras by position, and arguments that are gone.
fr.calibration_error(x, y, 10)  # error
fr.calibration_curve(x, y, 10)  # error
fr.pseudo_label_loss(x, x, 0.9)  # error
fr.optim.penalty_groups(model, 1e-5)  # error
fr.FreeAdversarial(0.1, 4)  # error
fr.fgsm(model, x, y, 0.1, nn.CrossEntropyLoss())  # error
fr.pretrain_autoencoder(model, x, seed=0)  # error
fr.retrain(lambda: model, print, (x, y), (x, y), epochs=3, batch_size=50)  # error
fr.EarlyStopping(model, pateince=5)  # error
LightningStopping("val_loss", pateince=5)  # error
LightningStopping("val_loss", False)  # error

# Results that are taken for something else.
loss: float = fr.adversarial_loss(model, x, y, 0.1)  # error
accuracy: int = fr.robust_accuracy(model, (x, y), 0.1)  # error
mask = fr.pseudo_label_loss(x).mask  # error
stop: str = fr.EarlyStopping(model).step(0.5)  # error
bins = fr.calibration_curve(x, y).bins  # error
