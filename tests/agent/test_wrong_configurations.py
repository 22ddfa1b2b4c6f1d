"""Whatever is wrong with a configuration is said in one line, at once: the key, the value, and what is allowed."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Literal, get_args, get_origin

import pytest
from forks import Forks

from agent.__main__ import main
from agent.config import TrialConfig, build_config
from diffusion_core.config import ConfigError, list_knobs
from diffusion_core.registry import Choice

ROOT = Path(__file__).parents[2]

Case = tuple[str, str, str]
"""The words; the key and value as the message must name them; a piece of what it must say is allowed."""

UNKNOWN: list[Case] = [
    ("--train.stepz=5", "train.stepz = '5'", "did you mean train.steps?"),
    ("--trian.lr=0.1", "trian.lr = '0.1'", "did you mean train.lr?"),
    ("--train.LR=0.1", "train.LR = '0.1'", "did you mean train.lr?"),
    ("--train-lr=0.1", "train-lr = '0.1'", "did you mean train.lr?"),
    ("--train/lr=0.1", "train/lr = '0.1'", "did you mean train.lr?"),
    ("--lr=0.1", "lr = '0.1'", "did you mean train.lr?"),
    ("--steps=5", "steps = 5", "steps.method, or did you mean train.steps?"),
    ("--batch_size=5", "batch_size = '5'", "did you mean train.batch_size?"),
    ("--dropout=0.5", "dropout = '0.5'", "did you mean model.dropout?"),
    ("--ema_decay=0.5", "ema_decay = '0.5'", "did you mean ema.decay?"),
    ("--model.num_res_block=2", "model.num_res_block = '2'", "did you mean model.num_res_blocks?"),
    ("--model.channel_mults=1,2", "model.channel_mults = '1,2'", "did you mean model.channel_multipliers?"),
    ("--model.attention_resolution=16", "model.attention_resolution = '16'", "model.attention_resolutions?"),
    ("--diffusion.scedule=linear", "diffusion.scedule = 'linear'", "did you mean diffusion.schedule?"),
    ("--diffusion.timestep=10", "diffusion.timestep = '10'", "did you mean diffusion.timesteps?"),
    ("--prune.kep=0.5", "prune.kep = '0.5'", "did you mean prune.keep?"),
    ("--pruning.keep=0.5", "pruning.keep = '0.5'", "did you mean prune.keep?"),
    ("--sample.guidance_scale=2", "sample.guidance_scale = '2'", "did you mean sample.guidance?"),
    ("--checkpoint.metric=val/loss", "checkpoint.metric = 'val/loss'", "did you mean checkpoint.best_metric?"),
    ("--data.names=digits", "data.names = 'digits'", "did you mean data.name?"),
    ("--sed=5", "sed = '5'", "did you mean seed?"),
    ("--presets=digits", "presets = 'digits'", "did you mean preset?"),
    ("--wandb.project=x", "wandb.project = 'x'", "--help all lists all keys"),
    ("--zzz=1", "zzz = '1'", "--help all lists all keys"),
    ("--zzz", "zzz = 'true'", "--help all lists all keys"),
    ("--=1", " = '1'", "--help all lists all keys"),
    ("--train.lr.peak=0.1", "train.lr.peak = '0.1'", "did you mean train.lr?"),
    ("--print-config=1", "print-config = '1'", "--help all lists all keys"),
    ("--tra\nin.lr=1", r"'tra\nin.lr' = '1'", "did you mean train.lr?"),
    ("--train={'lrr':0.1}", "train.lrr = 0.1", "did you mean train.lr?"),
    ("--train={'lr':{'peak':0.1}}", "train.lr.peak = 0.1", "did you mean train.lr?"),
    ("--train={'lrr':{}}", "train.lrr = {}", "did you mean train.lr?"),
    ("--train.lrr=1 --sample.stepz=2", "train.lrr = '1'", "train.lr?; sample.stepz = '2': unknown key; did you mean"),
]

STRAY: list[Case] = [
    ("digits", "'digits'", "expected --key=value"),
    ("train.lr=2", "train.lr = '2'", "expected a number > 0 and <= 1"),
    ("+train.lrr=1", "train.lrr = '1'", "did you mean train.lr?"),
    ("+++train.lr=0.1", "'+++train.lr=0.1'", "expected --key=value"),
    ('{"train.lrr":1}', "train.lrr = 1", "did you mean train.lr?"),
    ('{"train.steps":true}', "train.steps = True", "expected an integer >= 1"),
    ('{"train.lr":', """'{"train.lr":'""", "not valid JSON"),
    ('{"a":' * 5000, """'{"a":{"a":""", "not valid JSON"),
    ("--ema.warmup train.lr=0.1", "ema.warmup = 'train.lr=0.1'", "expected true or false"),
    ("-train.lr=0.1", "'-train.lr=0.1'", "expected --key=value"),
    ("--", "'--'", "expected --key=value"),
    ("--preset=digits 5", "'5'", "expected --key=value"),
    ("--train.lr 0.1 0.2", "'0.2'", "expected --key=value"),
]

SECTIONS: list[Case] = [
    ("--train=5", "train = 5", "set one of its keys, such as train.steps"),
    ("--train", "train = 'true'", "set one of its keys, such as train.steps"),
    ("--model=big", "model = 'big'", "set one of its keys, such as model.channels"),
    ("--prune=None", "prune = None", "set one of its keys, such as prune.method"),
    ("--data=[1]", "data = [1]", "set one of its keys, such as data.name"),
    ("--ema={'decay':", "ema = \"{'decay':\"", "set one of its keys, such as ema.decay"),
    ("--ema={[]:1}", "ema = '{[]:1}'", "set one of its keys, such as ema.decay"),
    ("--ema=" + "-" * 100_000 + "1", "ema = '---", "set one of its keys, such as ema.decay"),
]

INTEGER = "expected an integer"
NUMBER = "expected a number"
BOOLEAN = "expected true or false"
TYPES: list[Case] = [
    # Integers
    ("--train.steps=many", "train.steps = 'many'", f"{INTEGER} >= 1"),
    ("--train.steps=1.5", "train.steps = '1.5'", f"{INTEGER} >= 1"),
    ("--train.steps=1e-3", "train.steps = '1e-3'", f"{INTEGER} >= 1"),
    ("--train.steps=", "train.steps = ''", f"{INTEGER} >= 1"),
    ("--train.steps", "train.steps = 'true'", f"{INTEGER} >= 1"),
    ("--train.steps=True", "train.steps = 'True'", f"{INTEGER} >= 1"),
    ("--train.steps=None", "train.steps = 'None'", f"{INTEGER} >= 1"),
    ("--train.steps=nan", "train.steps = 'nan'", f"{INTEGER} >= 1"),
    ("--train.steps=inf", "train.steps = 'inf'", f"{INTEGER} >= 1"),
    ("--train.steps=[5]", "train.steps = '[5]'", f"{INTEGER} >= 1"),
    ("--train.steps=5,000", "train.steps = '5,000'", f"{INTEGER} >= 1"),
    ("--train.steps=0x10", "train.steps = '0x10'", f"{INTEGER} >= 1"),
    ("--train={'steps':True}", "train.steps = True", f"{INTEGER} >= 1"),
    ("--train={'steps':1.5}", "train.steps = 1.5", f"{INTEGER} >= 1"),
    ("--train={'steps':None}", "train.steps = None", f"{INTEGER} >= 1"),
    ("--train={'steps':{}}", "train.steps = {}", f"{INTEGER} >= 1"),
    ("--data.image_size=big", "data.image_size = 'big'", f"{INTEGER} >= 4 and <= 1024 or None"),
    ("--prune.step=half", "prune.step = 'half'", f"{INTEGER} >= 0 or None"),
    ("--seed=random", "seed = 'random'", f"{INTEGER} >= 0 and < {2**63}"),
    ("--seed=None", "seed = 'None'", f"{INTEGER} >= 0"),
    # Numbers
    ("--train.lr=fast", "train.lr = 'fast'", f"{NUMBER} > 0 and <= 1"),
    ("--train.lr=nan", "train.lr = 'nan'", f"{NUMBER} > 0 and <= 1"),
    ("--train.lr=inf", "train.lr = 'inf'", f"{NUMBER} > 0 and <= 1"),
    ("--train.lr=-inf", "train.lr = '-inf'", f"{NUMBER} > 0 and <= 1"),
    ("--train.lr=True", "train.lr = 'True'", f"{NUMBER} > 0 and <= 1"),
    ("--train.lr", "train.lr = 'true'", f"{NUMBER} > 0 and <= 1"),
    ("--train.lr=None", "train.lr = 'None'", f"{NUMBER} > 0 and <= 1"),
    ("--train.lr=0,1", "train.lr = '0,1'", f"{NUMBER} > 0 and <= 1"),
    ("--train.lr=[0.1]", "train.lr = '[0.1]'", f"{NUMBER} > 0 and <= 1"),
    ("--train.lr=2e-4x", "train.lr = '2e-4x'", f"{NUMBER} > 0 and <= 1"),
    ("--train={'lr':True}", "train.lr = True", f"{NUMBER} > 0 and <= 1"),
    ("--model={'dropout':False}", "model.dropout = False", f"{NUMBER} >= 0 and < 1"),
    ("--train={'lr':[0.1]}", "train.lr = [0.1]", f"{NUMBER} > 0 and <= 1"),
    ("--train.grad_clip=inf", "train.grad_clip = 'inf'", f"{NUMBER} > 0 or None"),
    ("--train.grad_clip=nan", "train.grad_clip = 'nan'", f"{NUMBER} > 0 or None"),
    ("--train.grad_clip=off", "train.grad_clip = 'off'", f"{NUMBER} > 0 or None"),
    ("--train={'grad_clip':True}", "train.grad_clip = True", f"{NUMBER} > 0 or None"),
    # Booleans
    ("--ema.warmup=maybe", "ema.warmup = 'maybe'", BOOLEAN),
    ("--ema.warmup=2", "ema.warmup = '2'", BOOLEAN),
    ("--ema.warmup=0.5", "ema.warmup = '0.5'", BOOLEAN),
    ("--ema.warmup=", "ema.warmup = ''", BOOLEAN),
    ("--ema.warmup=None", "ema.warmup = 'None'", BOOLEAN),
    ("--ema={'warmup':2}", "ema.warmup = 2", BOOLEAN),
    ("--model.class_conditional=[True]", "model.class_conditional = '[True]'", BOOLEAN),
    ("--sample.clip_x0=-1", "sample.clip_x0 = '-1'", BOOLEAN),
    ("--checkpoint.resume=must", "checkpoint.resume = 'must'", BOOLEAN),
    ("--checkpoint.upload=never", "checkpoint.upload = 'never'", BOOLEAN),
    ("--log.progress=plain", "log.progress = 'plain'", BOOLEAN),
    ("--data.horizontal_flip=auto", "data.horizontal_flip = 'auto'", f"{BOOLEAN} or None"),
    # Text
    ("--log.dir=", "log.dir = ''", "expected text that is not empty or None"),
    ("--data.path=", "data.path = ''", "expected text that is not empty or None"),
    ("--log={'dir':5}", "log.dir = 5", "expected text that is not empty or None"),
    ("--log={'dir':True}", "log.dir = True", "expected text that is not empty or None"),
    ("--data={'path':['a']}", "data.path = ['a']", "expected text that is not empty or None"),
]

MULTIPLIERS = "expected a list of at least 1 and at most 8 such as 1,2,2, each an integer >= 1 or a number > 0"
LISTS: list[Case] = [
    ("--model.channel_multipliers=", "model.channel_multipliers = ''", MULTIPLIERS),
    ("--model.channel_multipliers=[]", "model.channel_multipliers = '[]'", MULTIPLIERS),
    ("--model.channel_multipliers=1,1,1,1,1,1,1,1,1", "= '1,1,1,1,1,1,1,1,1'", MULTIPLIERS),
    ("--model.channel_multipliers=1,x", "model.channel_multipliers = '1,x'", MULTIPLIERS),
    ("--model.channel_multipliers=1,1.5.2", "model.channel_multipliers = '1,1.5.2'", MULTIPLIERS),
    ("--model.channel_multipliers=1,,2", "model.channel_multipliers = '1,,2'", MULTIPLIERS),
    ("--model.channel_multipliers=1,0", "model.channel_multipliers = '1,0'", MULTIPLIERS),
    ("--model.channel_multipliers=1,-2", "model.channel_multipliers = '1,-2'", MULTIPLIERS),
    ("--model.channel_multipliers=1,True", "model.channel_multipliers = '1,True'", MULTIPLIERS),
    ("--model.channel_multipliers=[[1,2]]", "model.channel_multipliers = '[[1,2]]'", MULTIPLIERS),
    ("--model.channel_multipliers=[1,2", "model.channel_multipliers = '[1,2'", MULTIPLIERS),
    ("--model.channel_multipliers=None", "model.channel_multipliers = 'None'", MULTIPLIERS),
    ("--model.channel_multipliers=1;2", "model.channel_multipliers = '1;2'", MULTIPLIERS),
    ("--model={'channel_multipliers':[1,True]}", "model.channel_multipliers = [1, True]", MULTIPLIERS),
    ("--model={'channel_multipliers':True}", "model.channel_multipliers = True", MULTIPLIERS),
    ("--model={'channel_multipliers':None}", "model.channel_multipliers = None", MULTIPLIERS),
    ("--model={'channel_multipliers':{1:2}}", "model.channel_multipliers.1 = 2", "did you mean model.channel_mult"),
    ("--model.attention_resolutions=16,x", "model.attention_resolutions = '16,x'", "each an integer >= 1"),
    ("--model.attention_resolutions=0", "model.attention_resolutions = '0'", "each an integer >= 1"),
    ("--model.attention_resolutions=None", "model.attention_resolutions = 'None'", "a list such as 1,2,2"),
    ("--ema.power_widths=0.3", "ema.power_widths = '0.3'", "each a number > 0 and < 0.28"),
    ("--ema.power_widths=0.05,0", "ema.power_widths = '0.05,0'", "each a number > 0 and < 0.28"),
    ("--ema.power_widths=narrow", "ema.power_widths = 'narrow'", "each a number > 0 and < 0.28"),
    ("--sample.guidance_interval=1", "sample.guidance_interval = '1'", "at least 2"),
    ("--sample.guidance_interval=1,2,3", "sample.guidance_interval = '1,2,3'", "at most 2"),
    ("--sample.guidance_interval=-1,2", "sample.guidance_interval = '-1,2'", "each a number >= 0"),
    ("--sample.guidance_interval=1,x", "sample.guidance_interval = '1,x'", "each a number >= 0 or None"),
]

UNIFORM = "--prune.method=structured --prune.widths=diffusers"
KARRAS = "--diffusion.schedule=karras --diffusion.prediction=edm"
COMBINATIONS: list[Case] = [
    ("--data.name=folder", "data.path = None", "data.name=folder needs data.path=DIR"),
    ("--preset=digits --data.path=x", "data.path = 'x'", "data.name=digits is built in"),
    ("--data.image_size=20", "model.channel_multipliers = [1, 2, 2, 2]", "a multiple of 8, not 20"),
    ("--data.name=mnist", "model.channel_multipliers = [1, 2, 2, 2]", "a multiple of 8, not 28"),
    ("--preset=digits --model.channel_multipliers=1,1,1,1,1", "= [1, 1, 1, 1, 1]", "a multiple of 16, not 8"),
    ("--model.attention_resolutions=15", "model.attention_resolutions = [15]", "works at 32, 16, 8, 4"),
    ("--model.attention_resolutions=16,2", "model.attention_resolutions = [16, 2]", "works at 32, 16, 8, 4"),
    ("--preset=digits --model.attention_resolutions=16", "model.attention_resolutions = [16]", "works at 8, 4"),
    ("--data.name=digits --model.channel_multipliers=1,2", "model.attention_resolutions = [16]", "--preset=digits"),
    ("--model.num_heads=3", "model.num_heads = 3", "must divide 256, the width at 16 pixels"),
    (
        "--model.attention_resolutions= --model.num_heads=3",
        "model.num_heads = 3",
        "must divide 256, the width of the middle block",
    ),
    (
        "--model.channel_multipliers=1,3,1,1 --model.num_heads=3",
        "model.num_heads = 3",
        "must divide 128, the width of the middle block",
    ),
    ("--model.channel_multipliers=1,1.1", "= [1, 1.1]", "1.1 of model.channels = 128 is 140.8 channels"),
    ("--model.channel_multipliers=1,0.001", "= [1, 0.001]", "0.128 channels; expected a whole number"),
    ("--model.head_channels=48", "model.head_channels = 48", "must divide 256, the width at 16 pixels"),
    ("--model.head_channels=64 --model.num_heads=2", "model.num_heads = 2", "no effect with model.head_channels=64"),
    ("--model.frequency_shift=64", "model.frequency_shift = 64", "expected less than 64, half of model.channels"),
    (f"{UNIFORM} --model.self_conditioning=1", "prune.widths = 'diffusers': model.self_conditioning", "expected False"),
    (f"{UNIFORM} --model.channel_multipliers=2,2", "prune.widths = 'diffusers': model.channel", "expected 1 at first"),
    (
        f"{UNIFORM} --diffusion.prediction=edm",
        "prune.widths = 'diffusers': diffusion.prediction",
        "expected one of eps",
    ),
    (
        f"{UNIFORM} --model.attention_resolutions=32,16 --model.num_heads=2",
        "prune.widths = 'diffusers': model.num_heads = 2",
        "heads of one width; here they would be 64, 128 wide",
    ),
    (
        f"{UNIFORM} --prune.block_keep=0.9,0.5,0.5,0.5,0.4,0.5,0.5,0.5,0.8",
        "prune.block_keep = [0.9, 0.5, 0.5, 0.5, 0.4, 0.5, 0.5, 0.5, 0.8]",
        "prune.widths=diffusers needs the shares of the way down on the way up too",
    ),
    (f"{UNIFORM} --prune.depth=0.5", "prune.depth = 0.5", "not with prune.widths=diffusers, which has all blocks"),
    (f"{UNIFORM} --prune.blocks=middle.0", "prune.blocks = ['middle.0']", "not with prune.widths=diffusers"),
    (f"{UNIFORM} --upsample.factor=2", "prune.widths = 'diffusers': upsample.factor", "gives the network no small"),
    ("--upsample.factor=3", "upsample.factor = 3", "expected a data.image_size that is a multiple of it, not 32"),
    ("--upsample.noise=0.3", "upsample.noise = 0.3", "has no effect without upsample.factor"),
    ("--upsample.sample_noise=0.1", "upsample.sample_noise = 0.1", "has no effect without upsample.factor"),
    (
        "--upsample.factor=4 --upsample.noise=0.1 --upsample.sample_noise=0.2",
        "upsample.sample_noise = 0.2",
        "expected at most upsample.noise = 0.1",
    ),
    (
        "--upsample.factor=2 --eval.figures=diversity,synthetic_accuracy",
        "eval.figures = ['diversity', 'synthetic_accuracy']: synthetic_accuracy compares with held-out images",
        "upsample.factor=2 is judged by enlarging those; leave it out",
    ),
    (
        "--upsample.factor=2 --eval.figures=svc_synthetic_accuracy",
        "eval.figures = ['svc_synthetic_accuracy']: svc_synthetic_accuracy compares with held-out images",
        "leave it out",
    ),
    (
        "--upsample.factor=4 --eval.figures=kernel --eval.reference=val",
        "eval.reference = 'val': compares with held-out images, and upsample.factor=4",
        "use eval.reference=train",
    ),
    ("--diffusion.beta_start=0.5", "diffusion.beta_start = 0.5", "at most diffusion.beta_end = 0.02"),
    ("--diffusion.beta_end=0.00001", "diffusion.beta_start = 0.0001", "at most diffusion.beta_end = 1e-05"),
    ("--sample.steps=1001", "sample.steps = 1001", "at most diffusion.timesteps = 1000"),
    ("--diffusion.timesteps=10", "sample.steps = 50", "at most diffusion.timesteps = 10"),
    ("--sample.guidance=2 --train.label_dropout=0", "sample.guidance = 2.0", "train.label_dropout above 0"),
    ("--sample.guidance=2 --model.class_conditional=0", "sample.guidance = 2.0", "model.class_conditional=true"),
    ("--sample.guidance=0 --train.label_dropout=0", "sample.guidance = 0.0", "train.label_dropout above 0"),
    ("--train.label_dropout=1", "train.label_dropout = 1.0", "use model.class_conditional=false"),
    ("--train.accumulation=3", "train.accumulation = 3", "must divide train.batch_size = 128"),
    ("--train.batch_size=1 --train.accumulation=2", "train.accumulation = 2", "must divide train.batch_size = 1"),
    (
        "--eval.classifier=network --model.class_conditional=0",
        "eval.classifier = 'network'",
        "model.class_conditional=true",
    ),
    ("--checkpoint.best_metric=eval/fid50k_train", "best_metric = 'eval/fid50k_train'", "one of train/loss, val/loss"),
    ("--checkpoint.best_metric=model/params", "checkpoint.best_metric = 'model/params'", "one of train/loss, val/loss"),
    ("--eval.figures=fid", "eval.figures = 'fid'", "frechet"),
    ("--eval.figures=kernel --eval.extractors=clasifier", "eval.extractors = 'clasifier'", "did you mean classifier?"),
    ("--eval.figures=kernel --eval.extractors=net.onnx", "eval.extractors = 'net.onnx'", "or a file of TorchScript"),
    ("--eval.figures=per_class --model.class_conditional=0", "eval.figures", "needs model.class_conditional=true"),
    ("--checkpoint.best_metric=eval/class_agreement", "checkpoint.best_metric = 'eval/class_agreement'", "network"),
    ("--preset=digits --eval.classifier=none", "checkpoint.best_metric = 'eval/class_agreement'", "data.name=digits"),
    (
        "--preset=digits --model.class_conditional=0 --sample.guidance=1",
        "checkpoint.best_metric = 'eval/class_agreement'",
        "model.class_conditional=true",
    ),
    ("--diffusion.schedule=karras", "diffusion.prediction = 'eps'", "diffusion.schedule=karras needs edm"),
    ("--diffusion.schedule=karras --diffusion.prediction=v", "diffusion.prediction = 'v'", "karras needs edm"),
    (f"{KARRAS} --diffusion.logsnr_shift=1", "diffusion.logsnr_shift = 1.0", "not for diffusion.schedule=karras"),
    (
        "--diffusion.schedule=karras --diffusion.prediction=x0 --diffusion.zero_terminal_snr",
        "diffusion.prediction = 'x0'",
        "karras needs edm",
    ),
    (f"{KARRAS} --diffusion.zero_terminal_snr", "diffusion.zero_terminal_snr = True", "not for diffusion.schedule="),
    (f"{KARRAS} --model.learned_variance", "model.learned_variance = True", "not for diffusion.schedule=karras"),
    ("--diffusion.sigma_min=80", "diffusion.sigma_min = 80.0", "expected less than sigma_max = 80.0"),
    ("--diffusion.sigma_max=0.001", "diffusion.sigma_min = 0.002", "expected less than sigma_max = 0.001"),
    ("--diffusion.zero_terminal_snr", "diffusion.prediction = 'eps'", "diffusion.zero_terminal_snr needs x0 or v"),
    (
        "--diffusion.zero_terminal_snr --diffusion.prediction=edm",
        "diffusion.prediction = 'edm'",
        "diffusion.zero_terminal_snr needs x0 or v",
    ),
    ("--ema.power_widths=0.1,0.05,0.1", "ema.power_widths = [0.1, 0.05, 0.1]", "expected widths that differ"),
    ("--ema.power_widths=0.1,0.10000001", "ema.power_widths = [0.1, 0.10000001]", "in their first six digits"),
    ("--sample.variance=learned", "sample.variance = 'learned'", "needs model.learned_variance=true"),
    (
        "--sample.guidance_interval=0.1,5",
        "sample.guidance_interval = [0.1, 5.0]",
        "no effect with sample.guidance = 1.0",
    ),
    (
        "--sample.guidance=2 --sample.guidance_interval=5,0.1",
        "sample.guidance_interval = [5.0, 0.1]",
        "expected the lower level first",
    ),
    ("--sample.guidance=2 --sample.guidance_interval=1,1", "= [1.0, 1.0]", "expected the lower level first"),
    ("--ema.sampled=power", "ema.sampled = 'power'", "needs ema.power_widths, such as 0.05,0.1"),
    ("--ema.sampled=average", "ema.sampled = 'average'", "needs ema.average_from"),
    (
        "--prune.method=structured --ema.average_from=400000",
        "ema.average_from = 400000",
        "pruning restarts the averages 400000 steps before the end",
    ),
    ("--ema.average_from=800000", "ema.average_from = 800000", "less than train.steps = 800000"),
    ("--prune.step=800000", "prune.step = 800000", "less than train.steps = 800000"),
    ("--train.steps=5 --prune.step=6", "prune.step = 6", "less than train.steps = 5"),
    (
        "--train.steps=1 --prune.method=magnitude",
        "train.steps = 1",
        "prune.method=magnitude needs steps before and after pruning; expected at least 2",
    ),
    ("--train.steps=1 --prune.method=structured", "train.steps = 1", "expected at least 2"),
    ("--prune.keep=0.7", "prune.keep = 0.7", "has no effect with prune.method=none"),
    ("--prune.method=magnitude --prune.importance=l1", "prune.importance = 'l1'", "drop it or use structured"),
    ("--prune.method=structured --prune.threshold=0.5", "prune.threshold = 0.5", "use prune.importance=diff_pruning"),
    (
        "--prune.method=structured --prune.calibration_batches=5",
        "prune.calibration_batches = 5",
        "use prune.importance=diff_pruning, fisher, hessian, taylor, taylor_multivariable",
    ),
    (
        "--prune.method=structured --prune.scope=global --prune.block_keep=0.5,1,1,1,1,1,1,1,1",
        "prune.block_keep = [0.5, 1.0",
        "use prune.scope=auto, layer",
    ),
    ("--prune.method=structured --prune.block_keep=0.5", "prune.block_keep = [0.5]", "expected 9 shares: 4"),
    (
        "--prune.method=structured --prune.depth=1 --prune.block_keep=0.5,0.9,0.5,0.9,0.5,0.9,0.5,0.9,0.5",
        "prune.block_keep = [0.5, 0.9",
        "has no effect with prune.depth=1",
    ),
    (
        "--train.steps=120 --prune.method=rigl",
        "prune.interval = 100",
        "masks would not change between prune.step = 0 and prune.until = 90; expected less than 90",
    ),
    ("--train.steps=120 --prune.method=gradual", "prune.interval = 100", "prune.step = 30 and prune.until = 90"),
    (
        "--train.steps=120 --prune.method=rigl --prune.interval=5 --steps.method=consistency --steps.step=40 "
        "--checkpoint.best_metric=train/loss",
        "steps.step = 40",
        "expected at least 90, where the network is pruned",
    ),
    ("--init.checkpoint=a --init.artifact=b", "init.artifact = 'b'", "init.checkpoint is set as well"),
    ("--init.artifact=b --init.weights=model", "init.weights = 'model'", "expected ema"),
    ("--init.weights=model", "init.weights = 'model'", "has no effect without init.checkpoint"),
    ("--distill.output=1", "distill.checkpoint = None", "no teacher"),
    ("--prune.method=snip --distill.output=1", "prune.step = 0", "the teacher would be the untrained network"),
    ("--prune.method=structured --prune.step=0 --distill.features=1", "prune.step = 0", "set prune.step above 0"),
    ("--distill.artifact=b", "distill.output = 0.0", "the teacher 'b' has no effect"),
    ("--steps.target=4", "steps.target = 4", "has no effect with steps.method=none; drop it or use consistency or"),
    (
        "--steps.method=progressive --steps.start=10 --checkpoint.best_metric=train/loss",
        "steps.start = 10",
        "does not halve to steps.target = 2; expected one of 4, 8, 16",
    ),
    ("--sample.start_level=0.02", "sample.steps = 50", "the timesteps up to sample.start_level = 0.02"),
]

SEVERAL: list[Case] = [
    ("--train.lr=-1 --seed=-1", "seed = '-1'", "; train.lr = '-1': expected a number > 0 and <= 1"),
    ("--trian.lr=1 --train.lr=-1", "trian.lr = '1'", "did you mean train.lr?; train.lr = '-1': expected"),
    ("--train.lr=-1 --preset=nope", "train.lr = '-1'", "preset = 'nope': expected one of cifar10, cifar100, mnist"),
    # A combination is not judged while a key is unknown: it may be what is missing.
    ("--data.nam=digits --model.attention_resolutions=4,2", "data.nam = 'digits'", "did you mean data.name?"),
]


def out_of_range() -> list[Case]:
    """For every bound in the schema the nearest value beyond it."""
    cases = []
    for key, field in list_knobs(TrialConfig):
        constraints = list(field.metadata)
        for part in get_args(field.annotation):
            constraints += [m for extra in get_args(part)[1:] for m in (getattr(extra, "metadata", None) or [extra])]
        whole = "int" in str(field.annotation)
        small = 1 if whole else 1e-9
        for constraint in constraints:
            for name, sign, beyond in (("ge", ">=", -small), ("gt", ">", 0), ("le", "<=", small), ("lt", "<", 0)):
                bound = getattr(constraint, name, None)
                if bound is not None and "list" not in str(field.annotation):
                    value = bound + beyond
                    cases.append(
                        (f"--{key}={value}", f"{key} = '{value}'", f"{sign} {bound if whole else format(bound, 'g')}")
                    )
    return cases


def wrong_choices() -> list[Case]:
    """For every knob with a list of choices: another word, another case, None, and a number."""
    cases = []
    for key, field in list_knobs(TrialConfig):
        named = [choice.values() for choice in field.metadata if isinstance(choice, Choice)]
        if named or get_origin(field.annotation) is Literal:
            choices = named[0] if named else get_args(field.annotation)
            offered = "expected one of " + ", ".join(choices)
            for word in (f"{choices[0]}x", choices[-1].upper(), f" {choices[0]}", "", "3"):
                if word not in choices:  # 2:4 has no other case.
                    cases.append((f"--{key}={word}".replace(" ", "\0"), f"{key} = {word!r}", offered))
    return cases


CASES = UNKNOWN + STRAY + SECTIONS + TYPES + LISTS + COMBINATIONS + SEVERAL + out_of_range() + wrong_choices()


def split(words: str) -> list[str]:
    """The words of a case; a NUL stands for a blank inside a word."""
    return [word.replace("\0", " ") for word in words.split(" ")]


def check_message(err: str, named: str, allowed: str) -> None:
    assert err.startswith("error: ")
    assert err.endswith("\n")
    assert err.count("\n") == 1, err
    assert named in err
    assert allowed in err
    assert "Traceback" not in err
    assert "pydantic" not in err
    assert "object at 0x" not in err


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, in which no data may be read and in which nothing may have been made at the end."""

    def load_data(*_: object, **__: object) -> None:
        raise AssertionError("data were read although the configuration is wrong")

    monkeypatch.setattr("agent.session.load_data", load_data)
    folder = tmp_path / "empty"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def expect_refusal(words: list[str], named: str, allowed: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(Path.cwd().rglob("*"))
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    check_message(err, named, allowed)
    assert sorted(Path.cwd().rglob("*")) == before, "something was written"


@pytest.mark.parametrize(("words", "named", "allowed"), CASES, ids=[words[:60] or "-" for words, _, _ in CASES])
@pytest.mark.usefixtures("nowhere")
def test_a_wrong_configuration_is_refused(
    words: str, named: str, allowed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    expect_refusal(split(words), named, allowed, capsys)


def test_there_are_many_wrong_configurations_and_none_twice() -> None:
    assert len(CASES) > 250
    assert len({words for words, _, _ in CASES}) == len(CASES)


def test_every_bounded_knob_and_every_choice_is_among_them() -> None:
    """The cases made from the schema are not empty by some slip."""
    bounded = {words[2:].partition("=")[0] for words, _, _ in out_of_range()}
    assert {"train.lr", "seed", "data.image_size", "prune.step", "train.grad_clip", "ema.decay"} <= bounded
    assert {"diffusion.beta_start", "sample.guidance", "log.every", "model.channels"} <= bounded
    assert len(out_of_range()) >= 50
    assert len({words.partition("=")[0] for words, _, _ in wrong_choices()}) >= 13


@pytest.mark.parametrize("words", ["--train.lr=0.1 --config=x --print-config", "--seed=x --dry-run", "x --dry-run"])
@pytest.mark.usefixtures("nowhere")
def test_print_config_and_dry_run_refuse_too(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    expect_refusal(split(words), " = " if "=" in words else "'x'", "", capsys)


YAML_CASES: list[tuple[str, str | bytes, str, str]] = [
    ("unknown", "train:\n  lrr: 0.1\n", "train.lrr = 0.1", "did you mean train.lr?"),
    ("misspelt section", "tran: {lr: 0.1}\n", "tran = {'lr': 0.1}", "unknown key; did you mean"),
    ("wrong type", "train: {lr: fast}\n", "train.lr = 'fast'", "expected a number > 0 and <= 1"),
    ("boolean for an integer", "train: {steps: yes}\n", "train.steps = True", "expected an integer >= 1"),
    ("boolean for a number", "train.lr: true\n", "train.lr = True", "expected a number > 0 and <= 1"),
    ("boolean for a choice", "diffusion.loss: off\n", "diffusion.loss = False", "expected one of l2, l1"),
    ("boolean in a list", "model.channel_multipliers: [1, true]\n", "= [1, True]", "each an integer >= 1"),
    ("infinity", "train.grad_clip: .inf\n", "train.grad_clip = inf", "expected a number > 0 or None"),
    ("not a number", "train.lr: .nan\n", "train.lr = nan", "expected a number > 0 and <= 1"),
    ("out of range", "seed: -1\n", "seed = -1", "expected an integer >= 0"),
    ("null", "train.lr: null\n", "train.lr = None", "expected a number > 0 and <= 1"),
    ("date", "train.lr: 2024-01-01\n", "train.lr = datetime.date(2024, 1, 1)", "expected a number"),
    ("empty section", "train:\n", "train = None", "train is a section; set one of its keys, such as train.steps"),
    ("section as a number", "train: 5\n", "train = 5", "train is a section"),
    ("section as a list", "train: [{lr: 1}]\n", "train = [{'lr': 1}]", "train is a section"),
    ("mapping for a number", "train: {lr: {min: 0.1}}\n", "train.lr.min = 0.1", "did you mean train.lr?"),
    ("empty mapping for a number", "train: {lr: {}}\n", "train.lr = {}", "expected a number > 0 and <= 1"),
    ("preset", "preset: nope\n", "preset = 'nope'", "expected one of cifar10, cifar100, mnist, digits"),
    ("preset as a list", "preset: [digits]\n", "preset = ['digits']", "expected one of cifar10, cifar100"),
    ("preset as a mapping", "preset: {a: 1}\n", "preset", "cifar10"),
    ("combination", "sample.steps: 2000\n", "sample.steps = 2000", "at most diffusion.timesteps = 1000"),
    ("number as key", "5: 0.1\n", "5: expected", "a name such as train.lr"),
    ("boolean as key", "on: 0.1\n", "True: expected", "a name such as train.lr"),
    ("null as key", "null: 0.1\n", "None: expected", "a name such as train.lr"),
    ("number as inner key", "train: {5: 0.1}\n", "train.5 = 0.1", "did you mean train.lr?"),
    ("a list", "- train.lr: 0.1\n", "--config = 'file.yaml'", "expected a mapping of keys to values"),
    ("text", "train.lr=0.1\n", "--config = 'file.yaml'", "expected a mapping of keys to values"),
    ("a number", "5\n", "--config = 'file.yaml'", "expected a mapping of keys to values"),
    ("false", "false\n", "--config = 'file.yaml'", "expected a mapping of keys to values"),
    ("broken", "train: {lr: 0.1\n", "--config = 'file.yaml'", "not valid YAML: "),
    ("a tab", "train:\n\tlr: 0.1\n", "--config = 'file.yaml'", "not valid YAML: "),
    ("two documents", "seed: 1\n---\nseed: 2\n", "--config = 'file.yaml'", "not valid YAML: "),
    ("a key twice", "seed: 1\nseed: 2\n", "--config = 'file.yaml'", "seed is given twice"),
    ("an inner key twice", "train:\n  lr: 0.1\n  steps: 5\n  lr: 0.2\n", "--config = 'file.yaml'", "lr is given twice"),
    ("no such date", "seed: 2024-13-01\n", "--config = 'file.yaml'", "not valid YAML: month must be in 1..12"),
    ("a tag", "seed: !!python/object/apply:os.getcwd []\n", "--config = 'file.yaml'", "not valid YAML: "),
    ("an unknown anchor", "seed: *x\n", "--config = 'file.yaml'", "not valid YAML: "),
    ("binary", b"\x89PNG\r\n\x1a\n\xff\xfe", "--config = 'file.yaml'", "not a text file"),
    ("control characters", b"seed: \x00\x01\n", "--config = 'file.yaml'", "not valid YAML: "),
]


@pytest.mark.parametrize(("content", "named", "allowed"), [c[1:] for c in YAML_CASES], ids=[c[0] for c in YAML_CASES])
def test_a_wrong_file_is_refused(
    content: str | bytes, named: str, allowed: str, nowhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = content if isinstance(content, bytes) else content.encode()
    (nowhere / "file.yaml").write_bytes(data)
    expect_refusal(["--config=file.yaml"], named, allowed, capsys)


@pytest.mark.parametrize(
    ("word", "named", "allowed"),
    [
        ("--config=missing.yaml", "--config = 'missing.yaml'", "No such file or directory"),
        ("--config=no/such/folder.yaml", "--config = 'no/such/folder.yaml'", "No such file or directory"),
        ("--config", "--config = 'true'", "No such file or directory"),
        ("--config=", "--config = '.'", "Is a directory"),
        ("--config=" + "x" * 5000, "--config = 'xxx", "File name too long"),
    ],
)
@pytest.mark.usefixtures("nowhere")
def test_a_file_that_is_none_is_refused(
    word: str, named: str, allowed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    expect_refusal([word], named, allowed, capsys)


def test_a_folder_or_an_unreadable_file_is_refused(nowhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (nowhere / "folder.yaml").mkdir()
    expect_refusal(["--config=folder.yaml"], "--config = 'folder.yaml'", "Is a directory", capsys)
    (nowhere / "loop.yaml").symlink_to("loop.yaml")
    expect_refusal(["--config=loop.yaml"], "--config = 'loop.yaml'", "symbolic links", capsys)


def test_a_wrong_value_of_the_file_is_not_blamed_when_the_command_line_overrides_it(nowhere: Path) -> None:
    (nowhere / "file.yaml").write_text("seed: -1\n")
    assert main(["--config=file.yaml", "--seed=1", "--print-config"]) == 0


# What is known only on this machine: said before data are read, as far as it can be


@pytest.mark.usefixtures("nowhere")
def test_a_gpu_that_is_not_there_is_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    expect_refusal(["--preset=digits", "--train.device=cuda"], "train.device = 'cuda'", "expected auto or cpu", capsys)


@pytest.mark.usefixtures("nowhere")
def test_an_unknown_wandb_mode_is_refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "onlin")
    expect_refusal(["--preset=digits"], "WANDB_MODE = 'onlin'", "one of online, offline, disabled", capsys)


@pytest.mark.parametrize("dry", [[], ["--dry-run"]], ids=["run", "dry run"])
@pytest.mark.parametrize(
    ("words", "named", "allowed"),
    [
        (["--eval.extractors=net.pt"], "eval.extractors = 'net.pt'", "no such file"),
        (["--eval.inception_weights=net.pth"], "eval.inception_weights = 'net.pth'", "no such file"),
        (["--eval.extractors=efficientnet-lite0"], "eval.extractors = 'efficientnet-lite0'", "pip install"),
    ],
)
@pytest.mark.usefixtures("nowhere")
def test_feature_networks_that_are_not_there_are_refused(
    words: list[str],
    named: str,
    allowed: str,
    dry: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("diffusion_core.evaluation.extractors.efficientnet.PACKAGE", "no_such_package")
    expect_refusal(["--preset=digits", "--eval.figures=kernel", *words, *dry], named, allowed, capsys)


@pytest.mark.usefixtures("nowhere")
def test_feature_networks_that_no_figure_needs_may_be_missing() -> None:
    assert main(["--preset=digits", "--eval.extractors=net.pt", "--dry-run"]) == 0


@pytest.mark.usefixtures("nowhere")
def test_a_damaged_run_folder_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    Path("run").mkdir()
    Path("run/run.json").write_text("{")
    expect_refusal(["--preset=digits", "--log.dir=run"], "log.dir = 'run'", "choose another folder", capsys)


def test_images_that_are_not_there_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    expect_refusal(
        ["--data.name=folder", "--train.device=cpu", "--data.path=nope"], "data.path = 'nope'", "no such folder", capsys
    )
    Path("flat").mkdir()
    expect_refusal(
        ["--data.name=folder", "--train.device=cpu", "--data.path=flat"],
        "data.path = 'flat'",
        "one sub-folder of images",
        capsys,
    )
    Path("flat/cats").mkdir()
    expect_refusal(
        ["--data.name=folder", "--train.device=cpu", "--data.path=flat"],
        "data.path = 'flat'",
        "'cats' holds no images",
        capsys,
    )


# The real command


@pytest.mark.parametrize(
    ("words", "named", "allowed"),
    [
        (["--trian.lr=0.1"], "trian.lr = '0.1'", "did you mean train.lr?"),
        (["--preset=digits", "--train.lr", "-0.1"], "train.lr = '-0.1'", "expected a number > 0 and <= 1"),
        (["--config=missing.yaml"], "--config = 'missing.yaml'", "No such file or directory"),
        (["--preset=digits", "--train.steps=1", "--prune.method=magnitude"], "train.steps = 1", "at least 2"),
        (["--data.name=folder", "--data.path=nope"], "data.path = 'nope'", "no such folder"),
    ],
)
def test_the_real_command_refuses(words: list[str], named: str, allowed: str, tmp_path: Path, forks: Forks) -> None:
    done = subprocess.run(
        [forks.interpreter, "-m", "agent", *words],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "WANDB_MODE": "offline"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    check_message(done.stderr, named, allowed)
    assert list(tmp_path.iterdir()) == []


def test_a_combination_is_not_judged_while_a_key_is_unknown() -> None:
    """It may be the very thing that is missing; but what is wrong by itself is said."""
    with pytest.raises(ConfigError) as caught:
        build_config({"data.nam": "digits", "model.attention_resolutions": [5]})
    assert caught.value.problems == ("data.nam = 'digits': unknown key; did you mean data.name?",)


def test_an_error_lists_its_problems() -> None:
    with pytest.raises(ConfigError) as caught:
        build_config({"train.lr": -1, "seed": True, "nope": 1})
    assert len(caught.value.problems) == 3
    assert str(caught.value) == "; ".join(caught.value.problems)
