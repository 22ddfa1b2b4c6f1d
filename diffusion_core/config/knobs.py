"""Every knob of the core: type, range, default, and one line that says what it does.

A knob's name is its dotted key (``train.lr``): the same on the command line, in YAML, in a sweep and in
``wandb.config``. The defaults are the CIFAR-10 model of Ho et al. 2020. Reading values is the business of
:mod:`diffusion_core.config.parsing`.
"""

from __future__ import annotations

from pathlib import PurePath
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from diffusion_core.config.metrics import INCEPTION, space_name
from diffusion_core.registries import DATASETS, METRICS, PREDICTIONS, SAMPLERS, SCHEDULES, STEP_METHODS
from diffusion_core.registry import Choice

Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]

MOST_IMAGES = 1_000_000
"""Most images that one call samples: their list has to fit in memory."""


class Section(BaseModel):
    """A group of knobs: immutable, typed, closed to unknown names."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)


class DataConfig(Section):
    """Knobs of ``data.*``: the data set and how its images are prepared."""

    name: Annotated[str, Choice(DATASETS)] = "cifar10"
    """Data set."""
    path: Annotated[str, Field(min_length=1)] | None = None
    """Folder of the images (`folder`), or where downloads are kept (default: ~/.cache/torchvision)."""
    image_size: Annotated[int, Field(ge=4, le=1024)] | None = None
    """Height and width in pixels; images are scaled and centre-cropped to it. None: the data set's own size."""
    horizontal_flip: bool | None = None
    """Mirror each training image with probability 1/2. None: yes for `cifar10`, `cifar100` and `folder`, else no."""
    val_fraction: Annotated[float, Field(gt=0.0, le=0.5)] = 0.2
    """Held-out share of each class of `digits` and `folder`. Unused where there is a test set: by the other data sets,
    and by a folder that holds train/ and val/ or test/, each with a sub-folder a class."""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the images, known before any is read."""
        record = DATASETS[self.name]
        size = self.image_size or record.size
        return record.channels, size, size

    @property
    def flips(self) -> bool:
        """Whether training images are mirrored."""
        return DATASETS[self.name].mirrored if self.horizontal_flip is None else self.horizontal_flip


class ModelConfig(Section):
    """Knobs of ``model.*``: the architecture of the U-Net."""

    channels: Annotated[int, Field(ge=4, le=4096)] = 128
    """Width of the U-Net at full resolution."""
    channel_multipliers: Annotated[
        list[Positive | Annotated[float, Field(gt=0.0)]], Field(min_length=1, max_length=8)
    ] = [1, 2, 2, 2]
    """Width at each resolution, as multiples of model.channels; each further entry halves the resolution. A multiple
    such as 1.5 has to give a whole width."""
    num_res_blocks: Annotated[int, Field(ge=1, le=16)] = 2
    """Residual blocks at each resolution on the way down (one more on the way up)."""
    attention_resolutions: list[Positive] = [16]
    """Heights (in pixels) at which self-attention follows each residual block."""
    num_heads: Annotated[int, Field(ge=1, le=64)] = 1
    """Attention heads; must divide the width wherever there is attention."""
    head_channels: Positive | None = None
    """Width of an attention head, so that wider layers have more heads. None: model.num_heads heads everywhere."""
    embedding_channels: Positive | None = None
    """Width of the embedding of time and label. None: four times model.channels."""
    frequency_shift: Annotated[float, Field(ge=-4096.0, lt=2048.0)] = 1.0
    """Shift s of the timestep's frequencies 10000^(-i/(n-s)), i = 0 to n-1, with n = model.channels/2. 1: the last one
    is 1/10000 (Ho et al. 2020). 0: the formula of Vaswani et al. 2017, and the default of Diffusers."""
    time_order: Literal["sin_cos", "cos_sin"] = "sin_cos"
    """Order of the timestep's features: sines first (Ho et al. 2020), or cosines first (the default of Diffusers)."""
    downsample_padding: Literal["end", "both"] = "end"
    """Zeros around the input of a downsampling convolution: at the right and bottom (Ho et al. 2020), or on all sides
    (the default of Diffusers)."""
    dropout: Fraction = 0.1
    """Dropout probability inside residual blocks, while training."""
    norm_groups: Positive = 32
    """Groups of the group norms (where the width is no multiple of it, the largest common divisor)."""
    norm_epsilon: Annotated[float, Field(gt=0.0, le=0.1)] = 1e-6
    """Added to the variances of the group norms (1e-6 in Ho et al. 2020, 1e-5 by default in Diffusers)."""
    conditioning: Literal["bias", "scale_shift"] = "bias"
    """How time and label enter a residual block: added per channel (Ho et al. 2020), or as scale and shift of its
    second norm (adaptive group norm, Dhariwal & Nichol 2021)."""
    self_conditioning: bool = False
    """Show the network its last estimate of the clean image (Chen et al. 2022, Analog Bits); slower to train."""
    learned_variance: bool = False
    """Learn the variance of the reverse steps too, by the hybrid loss (Nichol & Dhariwal 2021)."""
    class_conditional: bool = True
    """Whether the network is told the class; False trains an unconditional model."""

    @property
    def widths(self) -> list[int]:
        """The width at each resolution, the highest first."""
        return [round(self.channels * multiplier) for multiplier in self.channel_multipliers]

    def heads(self, width: int) -> int:
        """Return the number of attention heads of a layer of ``width`` channels."""
        return self.num_heads if self.head_channels is None else width // self.head_channels


class DiffusionConfig(Section):
    """Knobs of ``diffusion.*``: noise schedule, prediction and loss."""

    schedule: Annotated[str, Choice(SCHEDULES)] = "linear"
    """Noise schedule."""
    timesteps: Annotated[int, Field(ge=2, le=100_000)] = 1000
    """Number of noise levels T."""
    beta_start: Annotated[float, Field(gt=0.0, lt=1.0)] = 1e-4
    """First variance of the linear schedule, stated for T = 1000 and scaled to other T."""
    beta_end: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.02
    """Last variance of the linear schedule, stated for T = 1000 and scaled to other T."""
    logsnr_shift: Annotated[float, Field(ge=-20.0, le=20.0)] = 0.0
    """Added to the logarithm of the signal-to-noise ratio at every timestep. 2 ln(64 / image size) with the cosine
    schedule approximates the shifted cosine of simple diffusion (Hoogeboom et al. 2023): within 0.1 from 14% of the
    timesteps on, and up to 2.8 less at the first one. Not for karras."""
    zero_terminal_snr: bool = False
    """Rescale so that the last timestep is pure noise (Lin et al. 2023); needs diffusion.prediction=x0 or v."""
    sigma_min: Annotated[float, Field(gt=0.0)] = 0.002
    """Smallest noise level of the karras schedule."""
    sigma_max: Annotated[float, Field(gt=0.0)] = 80.0
    """Largest noise level of the karras schedule."""
    prediction: Annotated[str, Choice(PREDICTIONS)] = "eps"
    """What the network predicts."""
    loss: Literal["l2", "l1", "huber"] = "l2"
    """Distance between prediction and target: squared, absolute, or squared up to diffusion.huber_delta."""
    huber_delta: Annotated[float, Field(gt=0.0)] = 0.5
    """Error beyond which the huber loss grows linearly."""
    weighting: Literal["uniform", "min_snr", "p2", "edm"] = "uniform"
    """Weight of each noise level: the same for the network's own output (uniform), min-SNR (Hang et al. 2023), P2 (Choi
    et al. 2022), or that of EDM (Karras et al. 2022)."""
    min_snr_gamma: Annotated[float, Field(gt=0.0)] = 5.0
    """Signal-to-noise ratio at which the min_snr weighting is capped."""
    p2_gamma: Annotated[float, Field(ge=0.0, le=10.0)] = 1.0
    """Exponent of the p2 weighting."""
    timestep_sampling: Literal["uniform", "lognormal"] = "uniform"
    """How timesteps are drawn in training: evenly, or so that the logarithm of the noise level is normal (EDM)."""
    lognormal_mean: Annotated[float, Field(ge=-10.0, le=10.0)] = -1.2
    """Mean of the logarithm of the noise level under lognormal sampling."""
    lognormal_std: Annotated[float, Field(gt=0.0, le=10.0)] = 1.2
    """Standard deviation of the logarithm of the noise level under lognormal sampling."""
    vlb_weight: Annotated[float, Field(gt=0.0, le=1.0)] = 0.001
    """Weight of the variational bound in the hybrid loss."""
    offset_noise: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    """Amplitude of noise that is the same for all pixels of a channel, added in training."""


class UpsampleConfig(Section):
    """Knobs of ``upsample.*``: a model that enlarges small images, as the stage after another model."""

    factor: Annotated[int, Field(ge=2, le=16)] | None = None
    """Enlarge images by this factor: the network also sees each image at 1/factor of data.image_size, and learns to
    sample the whole one. None: an ordinary model."""
    noise: Annotated[float, Field(ge=0.0, le=1.0)] = 0.2
    """Largest level of noise that is added to the small images in training, drawn evenly from 0 to it (Ho et al. 2021,
    Cascaded Diffusion Models). The network is told the level. It forgives the errors of the model before it."""
    sample_noise: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    """Level of noise that is added to the small images in sampling and for val/loss; at most upsample.noise."""

    @property
    def wanted(self) -> bool:
        """Whether the model enlarges images."""
        return self.factor is not None

    def channels(self, of_image: int) -> int:
        """Return the further channels of the network's input: the small image, and its level of noise."""
        return of_image + 1 if self.wanted else 0


class TrainConfig(Section):
    """Knobs of ``train.*``: optimisation, precision and device."""

    steps: Positive = 800_000
    """Optimizer steps."""
    batch_size: Positive | Literal["auto"] = 128
    """Images per optimizer step, over all processes and accumulated parts. auto: the largest power of two that fits the
    memory that is free, found before the first step and kept when the run is resumed; it changes what is trained.
    Give trials that share a GPU a number: agents started by hand do not know of each other, and the first one takes
    most of the memory."""
    accumulation: Positive = 1
    """Parts that a batch is split into to save memory; must divide the batch of each process."""
    lr: Annotated[float, Field(gt=0.0, le=1.0)] = 2e-4
    """Peak learning rate of AdamW."""
    lr_schedule: Literal["constant", "cosine"] = "constant"
    """After the warm-up: constant, or half a cosine down to zero at train.steps."""
    warmup_steps: Annotated[int, Field(ge=0)] = 5000
    """Optimizer steps over which the learning rate rises from zero."""
    weight_decay: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    """Decoupled weight decay of AdamW."""
    beta2: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.999
    """Decay of AdamW's second moment."""
    grad_clip: Annotated[float, Field(gt=0.0)] | None = 1.0
    """Largest norm of the gradient; None leaves it as it is."""
    label_dropout: Annotated[float, Field(ge=0.0, le=1.0)] = 0.1
    """Share of training images shown without their label, which classifier-free guidance needs."""
    precision: Literal["auto", "fp32", "tf32", "bf16", "fp16"] = "auto"
    """Arithmetic of the network; auto is bf16 where the processor or GPU computes in it, and fp16 on older GPUs with
    tensor cores (V100, T4). Weights stay fp32. fp16 scales the loss, and skips steps whose gradients overflow. tf32
    lets a GPU round the factors of products to 10 bits; a processor computes in fp32 then."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto takes a GPU if there is one."""
    compile: Literal["auto", "none", "blocks", "network"] = "auto"
    """Compile the network for training (torch.compile): as a whole, block by block, or not; auto compiles it on a GPU
    where training takes long enough to pay for it. Rounding differs. Later trials find it in the compiler's
    cache."""
    cuda_graphs: bool = True
    """On one GPU, record an optimizer step once and replay it, so that the processor need not launch each kernel anew.
    The result is the same; the step's memory stays reserved between steps."""
    deterministic: bool = False
    """Only algorithms whose result is the same bit for bit on every run, which may be slower on a GPU. (The processor's
    are.)"""

    @property
    def images_per_step(self) -> int:
        """The batch size, where it is known: ``auto`` becomes a number before anything is trained."""
        assert isinstance(self.batch_size, int), "train.batch_size=auto was not settled"
        return self.batch_size


class EmaConfig(Section):
    """Knobs of ``ema.*``: averages of the weights."""

    decay: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9999
    """Decay per step of the averaged weights, which are what is sampled, validated and published."""
    warmup: bool = True
    """Average over fewer steps at first: decay at step n is at most (1 + n) / (10 + n)."""
    power_widths: list[Annotated[float, Field(gt=0.0, lt=0.28)]] = []
    """Further averages, with power functions of these relative widths (Karras et al. 2024, EDM2: 0.05 and 0.1)."""
    average_from: Annotated[int, Field(ge=0)] | None = None
    """A further, plain average of the weights after this many updates (SWA); None: none."""
    sampled: Literal["decay", "power", "average"] = "decay"
    """Which average is sampled, validated and published: by ema.decay, the first of ema.power_widths, or the plain one.
    The others are kept in checkpoints."""


class SampleConfig(Section):
    """Knobs of ``sample.*``: how images are generated."""

    sampler: Annotated[str, Choice(SAMPLERS)] = "ddim"
    """How images are sampled."""
    steps: Positive = 50
    """Steps an image, at most diffusion.timesteps; each is one network evaluation, with heun two."""
    spacing: Literal["uniform", "trailing", "quadratic", "karras"] = "uniform"
    """Which timesteps are visited: evenly spaced, evenly from the noisiest (trailing), denser near the image, or by
    Karras et al.'s noise levels."""
    start_level: Annotated[float, Field(gt=0.0)] | None = None
    """Noise level sigma/alpha at which sampling starts: timesteps above it are left out. None: at the last timestep.
    A network that predicts the noise knows the image badly where there is hardly any left."""
    eta: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    """Noise that DDIM adds: 0 none, 1 as much as ancestral sampling. Other samplers do without."""
    variance: Literal["fixed_small", "fixed_large", "learned"] = "fixed_large"
    """Noise that ddpm adds: the posterior's variance, the forward step's (beta), or what the network learned with
    model.learned_variance. Other samplers do without."""
    guidance: Annotated[float, Field(ge=0.0, le=100.0)] = 1.0
    """Classifier-free guidance scale: 1 is the plain conditional model, 0 ignores labels, more sharpens them."""
    guidance_interval: Annotated[list[Annotated[float, Field(ge=0.0)]], Field(min_length=2, max_length=2)] | None = None
    """Guide only where the noise level sigma/alpha lies between these two (Kynkaanniemi et al. 2024)."""
    clip_x0: bool = True
    """Clip the predicted clean image to [-1, 1] at every step."""
    every: Annotated[int, Field(ge=0)] = 5000
    """Optimizer steps between sample grids (and the GIF); 0: only at the end."""
    per_class: Annotated[int, Field(ge=1, le=1000)] = 8
    """Images of each class in the grid."""
    batch_size: Positive = 256
    """Images sampled at once; changes memory and speed, not the images."""
    compile: Literal["auto", "none", "network"] = "auto"
    """Compile the network for sampling (torch.compile); auto does on a GPU where there is enough to sample to pay for
    it. Rounding differs."""
    cuda_graphs: bool = True
    """On a GPU, record the network's evaluation once and replay it, so that the processor need not launch each kernel
    anew. The images are the same."""


class EvalConfig(Section):
    """Knobs of ``eval.*``: which figures are measured, when, and on how many images."""

    every: Annotated[int, Field(ge=0)] = 5000
    """Optimizer steps between evaluations; 0: only at the end."""
    val_images: Positive = 1000
    """Held-out images that val/loss is measured on, with noise that never changes."""
    classifier: Literal["auto", "none", "network"] = "auto"
    """Classifier for eval/class_agreement: a small network, trained on the real images once and kept in the cache; auto
    uses it for `digits`, where that takes seconds (see scripts/train_classifier.py for others)."""
    num_images: Annotated[int, Field(ge=1, le=MOST_IMAGES)] = 200
    """Images generated for the figures eval/*."""
    consistency_images: Annotated[int, Field(ge=0, le=100_000)] = 16
    """Images that the dense and the pruned network draw from the same seeds and labels, for prune/consistency_* at the
    end of a run that prunes; 0: none."""
    figures: list[Annotated[str, Choice(METRICS)]] = []
    """Further figures; distances, shares and scores are measured in the features of eval.extractors."""
    extractors: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)] = ["inception"]
    """Feature networks of eval.figures: inception (pytorch-fid's), classifier (the data set's), efficientnet-lite0
    (ImageNet's, which comes with an extra), or files: TorchScript (.pt), which the user trusts, or a classifier
    (.safetensors)."""
    reference: Literal["train", "val"] = "train"
    """Real images that generated ones are compared to: the training images, or those held out."""
    inception_weights: Annotated[str, Field(min_length=1)] | None = None
    """File of Inception-v3 weights in pytorch-fid's format. None: the published ones, downloaded once."""

    @property
    def in_features(self) -> bool:
        """Whether a figure needs feature networks."""
        return any(METRICS[figure].in_features for figure in self.figures)

    def space_names(self, data: str) -> list[str]:
        """What the feature spaces are called, by pattern where a file decides."""
        names = []
        for extractor in self.extractors:
            if extractor == "classifier":
                names.append(f"classifier-{data}")
            elif extractor == INCEPTION:
                names += [INCEPTION, *([f"{INCEPTION}-*"] if self.inception_weights else [])]
            else:
                path = PurePath(extractor)
                names.append("classifier-*" if path.suffix == ".safetensors" else space_name(path.stem))
        return names


class CheckpointConfig(Section):
    """Knobs of ``checkpoint.*``: when checkpoints are written and which are kept."""

    every: Annotated[int, Field(ge=0)] = 5000
    """Optimizer steps between checkpoints; 0: only at the end."""
    keep: Positive = 2
    """Newest checkpoints kept, on disk and on W&B; the best one is kept besides."""
    best_metric: Annotated[str, Field(min_length=1)] = "val/loss"
    """Figure that decides which checkpoint is `best`: any that this configuration logs and that is better one way."""
    resume: bool = True
    """Continue from the newest checkpoint of the run; False starts over and refuses a folder that has some."""
    upload: bool = True
    """Log checkpoints to W&B as artifacts (`model` for sampling, `training-state` for resuming)."""
    ttl_days: Annotated[int, Field(ge=1)] | None = 30
    """Days for which W&B keeps what is not kept for good: training states, and models that are neither the best one
    nor among the newest; None: for ever."""


class LogConfig(Section):
    """Knobs of ``log.*``: how often rows are logged and where the run's folder is."""

    every: Positive = 50
    """Optimizer steps between rows of train/*."""
    dir: Annotated[str, Field(min_length=1)] | None = None
    """Folder of this run: checkpoints, grids, GIFs, config, result. None: runs/<run id>."""
    progress: bool = True
    """Show a progress bar with loss, images/s and time left (on stderr)."""


class InitConfig(Section):
    """Knobs of ``init.*``: the checkpoint to start from."""

    checkpoint: Annotated[str, Field(min_length=1)] | None = None
    """Start from the weights of this checkpoint, or of the best one in a run's folder, of equal model.*; a pruned one
    keeps its widths and masks. None: start from nothing."""
    artifact: Annotated[str, Field(min_length=1)] | None = None
    """The same from W&B: a `model` artifact, such as model-abc123:best."""
    weights: Literal["ema", "model"] = "ema"
    """Which weights: the average that was validated, or as trained (not in artifacts)."""


class DistillConfig(Section):
    """Knobs of ``distill.*``: the teacher and the weights of the distillation losses."""

    output: Annotated[float, Field(ge=0.0, le=1000.0)] = 0.0
    """Weight, beside the loss, of the squared distance to what the teacher answers."""
    features: Annotated[float, Field(ge=0.0, le=1000.0)] = 0.0
    """Weight of the squared distance between maps of where teacher and student are active, at each resolution
    (Zagoruyko & Komodakis 2017), which does not ask how wide they are."""
    checkpoint: Annotated[str, Field(min_length=1)] | None = None
    """The teacher. None: the network as it was when this run pruned it."""
    artifact: Annotated[str, Field(min_length=1)] | None = None
    """The teacher from W&B: a `model` artifact."""

    @property
    def wanted(self) -> bool:
        """Whether there is anything to learn from a teacher."""
        return self.output > 0.0 or self.features > 0.0


class StepsConfig(Section):
    """Knobs of ``steps.*``: distillation of a trained network into a student that samples in few steps."""

    method: Annotated[str, Choice(STEP_METHODS, {"none": "no step distillation"})] = "none"
    """Method of step distillation. It is the last part of the run, after training and pruning."""
    target: Positive = 2
    """Steps an image that the student is made for. Its checkpoints are sampled so unless flags say otherwise."""
    start: Positive = 16
    """progressive: steps of the first teacher, steps.target times a power of two. Each stage halves them. Figures of
    stages before the last are logged as stage-8/eval/... and so on, by the steps of their students."""
    step: Annotated[int, Field(ge=0)] | None = None
    """Optimizer steps before it starts. None: half of those that remain after pruning, or 0 for a run with init.* that
    does not prune. Figures before it are logged as teacher/eval/... and so on."""
    lr: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    """Peak learning rate of each stage, which follows train.lr_schedule. None: train.lr."""
    guidance: Annotated[float, Field(ge=0.0, le=100.0)] | None = None
    """Guidance of the teacher, which the student learns: it is sampled without guidance, at half the cost. None:
    sample.guidance."""
    start_level: Annotated[float, Field(gt=0.0)] | None = None
    """Noise level at which the student starts. None: the last one, or 10 if the network cannot tell the image from pure
    noise (diffusion.prediction=eps)."""
    loss: Literal["l2", "pseudo_huber"] = "pseudo_huber"
    """Distance of the clean images: mean square (l2), or the pseudo-Huber distance of whole images (Song & Dhariwal
    2023)."""
    huber_c: Annotated[float, Field(ge=0.0)] | None = None
    """Distance below which pseudo_huber is quadratic. None: 0.00054 times the root of the number of pixels and
    channels."""
    weighting: Literal["auto", "uniform", "difference", "truncated_snr"] = "auto"
    """Weight of each noise level, for clean images: equal, the inverse difference of the two noise levels (consistency:
    Song & Dhariwal 2023), or the signal-to-noise ratio, at least 1 (Salimans & Ho 2022). auto: uniform for consistency,
    truncated_snr for progressive."""
    doublings: Annotated[int, Field(ge=1, le=30)] = 4
    """consistency: stages that each halve the distance between the two noise levels (Geng et al. 2024). Long trainings
    can use more: with 400 steps on digits, 4 give far better images than 8. consistency_distillation: how often it is
    halved, from the first step on."""

    @property
    def wanted(self) -> bool:
        """Whether there is a student to train."""
        return self.method != "none"
