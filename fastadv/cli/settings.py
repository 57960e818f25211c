"""What each setting of a run means, in the groups and the order in which help shows them."""

from __future__ import annotations

from collections.abc import Mapping

SETTINGS: Mapping[str, Mapping[str, str]] = {
    "Method and threat model": {
        "method": "training method; `fastadv methods` lists them",
        "variant": "another code's form of it; see `fastadv methods NAME`",
        "eps": "radius of the threat model in pixels, as 8/255",
        "eps_warmup": "epochs over which eps rises linearly from 0 in training",
        "norm": "norm of the threat model",
    },
    "Data": {
        "data": "digits, cifar10, cifar100, svhn, synthetic, "
        "folder:PATH, npz:PATH, tinyimagenet:PATH",
        "data_root": "folder of the data sets",
        "download": "download a missing data set",
        "limit": "train on this many images only",
        "label_noise": "share of training labels drawn anew from all classes; 1: random labels",
        "unlabelled": "images with pseudo-labels, written by `fastadv pseudo-label`",
        "image_size": "height and width, in pixels, to which images of a folder are resized",
        "image_sizes": "side of the training images by epoch, in pixels, as 128@0,224@6,288@12",
        "loader": "device: all images in memory; dali: decode files while training",
        "skip_broken": "leave out images of a folder that cannot be decoded",
        "pad": "largest shift of the random crops, in pixels",
        "padding": "border of the crops: black (constant), grey or reflected",
        "flip": "flip images horizontally at random",
        "augmentation": "base: crop and flip; joined by +: resized-crop, rotate, autoaugment, "
        "randaugment, trivialaugment, augmix, mixup, cutmix",
    },
    "Network": {
        "model": "network; timm:NAME, torchvision:NAME, or module:callable for your own",
        "width": "channels of the first stage (Wide ResNet: widening factor)",
        "depth": "layers of a Wide ResNet",
        "shortcut": "published form of the shortcut in a PreActResNet",
        "stem": "first layers of a ResNet: 3x3 (cifar), or 7x7 and pooled (imagenet)",
        "normalize": "normalize images by the data's mean and deviation, in the network",
        "dropout": "probability of dropout before the classifier (Wide ResNet: in its blocks)",
        "init": "begin with the weights in this run folder, checkpoint or file from elsewhere",
        "blocks": "modules whose input is perturbed too, such as layer1.*.conv1",
    },
    "Optimization": {
        "epochs": "passes over the training set",
        "batch_size": "images per update; auto: as many as fit into memory, by measuring",
        "optimizer": "sgd, adamw, or another of torch.optim; the rates of presets are SGD's, "
        "others take torch's",
        "optimizer_options": "more of its arguments, such as betas=0.9,0.95;eps=1e-6",
        "lr": "peak learning rate",
        "schedule": "learning rates: cosine, one-cycle, ..., or your module:function",
        "points": "learning rates by epoch with lines between, as 0@0,0.1@5,0@30",
        "end_factor": "share of the peak rate at which cosine, linear and exponential end",
        "warmup": "epochs over which the rate first rises linearly from 0",
        "drops": "epochs (below 1: shares of the run) of lower rates, such as 0.5,0.75",
        "drop_factors": "factor at each drop, such as 0.1,0.1,0.5; without it, 0.1 each",
        "peak": "share of the run before the peak of a triangular or one-cycle schedule",
        "momentum": "momentum of SGD",
        "cycle_momentum": "lower momentum by 0.1 at the peak of a triangular or one-cycle schedule",
        "nesterov": "Nesterov momentum",
        "weight_decay": "weight decay; adamw's is decoupled from the gradient",
        "decay_norms": "weight decay of the affine parameters of BatchNorm, too",
        "max_grad_norm": "clip the gradient to this norm",
    },
    "Speed and precision": {
        "device": "auto, cpu, cuda or cuda:N",
        "amp": "mixed precision for attack and outer pass",
        "amp_dtype": "type of mixed precision; fp16 with loss scaling",
        "attack_dtype": "precision of the attack alone",
        "tf32": "round float32 products on a GPU to TF32",
        "mode": "execution",
        "fused_norm": "own kernels for BatchNorm, ReLU and residuals on CUDA; "
        "auto: only where measured faster",
        "bn": "with several processes: batch statistics of each (local), or of all (global)",
        "deterministic": "refuse operations that are not reproducible",
    },
    "Evaluation": {
        "select": "choose the best epoch on a validation split or on the test set",
        "select_attack": "attack by which the best epoch is chosen",
        "val_fraction": "share of the training images in the validation split",
        "eval_alpha": "step of the evaluating attacks, in pixels",
        "eval_every": "epochs from one evaluation to the next",
        "eval_train": "evaluate on this many training images too, whenever on the others",
        "test_attacks": "final attacks, separated by commas",
        "test_limit": "evaluate on this many test images only",
    },
    "The run": {
        "seed": "seed of weights, order, augmentation and noise; 0,1,2: a run for each",
        "out": "run folder; without it, runs/METHOD-DATA",
        "checkpoint_minutes": "minutes after which a checkpoint is also saved within an epoch",
        "save_every": "epochs from one checkpoint to the next",
        "keep": "files to keep: best, last, previous (for a damaged last.pt), every-10; without "
        "last, no checkpoint stays at the end",
        "guard_overfitting": "when single-step training overfits, within an epoch: say so, stop, "
        "or go back and halve the attack's step",
    },
}

# Shown by `fastadv train --help`; all others by `--help-all`.
COMMON = frozenset(
    {
        *(
            "method",
            "variant",
            "eps",
            "norm",
            "data",
            "download",
            "model",
            "epochs",
            "batch_size",
            "lr",
        ),
        *("schedule", "device", "amp", "mode", "test_attacks", "seed", "out"),
    }
)
