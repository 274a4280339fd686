//! Kernels: blocks between an engine's pages and our layout, checksums on the
//! device, and the arithmetic of the reference engine.
//!
//! The sources are CUDA C in `gpudirect/kernels/`. [`Cuda`] compiles them by NVRTC
//! where that is installed, and else takes the PTX that lies beside them;
//! [`OnHost`] builds the very same sources with the host's C++ compiler, so that
//! tests run them without a device. Promises: sizes and addresses that a launch
//! derives are checked before it, and a missing library or compiler is an error.
//! Leaves to others: who owns the memory, and what the bytes mean.

mod cuda;
mod mover;
mod nvrtc;
mod on_host;
mod pages;
mod queue;
mod sum;

pub use cuda::Cuda;
pub use mover::{BlockTokens, Mover, Prepared};
pub use nvrtc::{Compiled, Nvrtc, Target};
pub use on_host::{FailsAfter, OnHost, every_queue};
pub use pages::{BlockShape, EnginePages, PageLayout};
pub use queue::{KernelBytes, KernelQueue, Launch, Parameters};
pub use sum::Summer;

use crate::error::DeviceError;

/// One file of kernels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Source {
    /// Gather and scatter.
    Move,
    /// Checksums.
    Checksum,
    /// The reference engine.
    Engine,
}

impl Source {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Move, Self::Checksum, Self::Engine];

    /// Its file's name without an ending.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Move => "move",
            Self::Checksum => "checksum",
            Self::Engine => "engine",
        }
    }

    /// CUDA C.
    pub const fn text(self) -> &'static str {
        match self {
            Self::Move => include_str!("../kernels/move.cu"),
            Self::Checksum => include_str!("../kernels/checksum.cu"),
            Self::Engine => include_str!("../kernels/engine.cu"),
        }
    }

    /// What NVRTC 13.0 makes of it for compute capability 9.0. `tools/dev/kernels`
    /// writes it anew, and a test compares.
    pub const fn ptx(self) -> &'static str {
        match self {
            Self::Move => include_str!("../kernels/ptx/move.ptx"),
            Self::Checksum => include_str!("../kernels/ptx/checksum.ptx"),
            Self::Engine => include_str!("../kernels/ptx/engine.ptx"),
        }
    }
}

/// What every source includes, by the name `common.cuh`.
const COMMON: &str = include_str!("../kernels/common.cuh");

/// One kernel. Its parameters are one structure, [`Parameters`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[allow(missing_docs, reason = "each is described in its source")]
pub enum Kernel {
    Gather16,
    Gather4,
    Gather1,
    Scatter16,
    Scatter4,
    Scatter1,
    Checksum,
    Embed,
    RmsNorm,
    Product,
    Add,
    Place,
    Attend,
    Silu,
    Rows,
}

impl Kernel {
    /// All of them.
    pub const ALL: [Self; 15] = [
        Self::Gather16,
        Self::Gather4,
        Self::Gather1,
        Self::Scatter16,
        Self::Scatter4,
        Self::Scatter1,
        Self::Checksum,
        Self::Embed,
        Self::RmsNorm,
        Self::Product,
        Self::Add,
        Self::Place,
        Self::Attend,
        Self::Silu,
        Self::Rows,
    ];

    /// Its name in the source.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Gather16 => "terrace_gather_16",
            Self::Gather4 => "terrace_gather_4",
            Self::Gather1 => "terrace_gather_1",
            Self::Scatter16 => "terrace_scatter_16",
            Self::Scatter4 => "terrace_scatter_4",
            Self::Scatter1 => "terrace_scatter_1",
            Self::Checksum => "terrace_checksum",
            Self::Embed => "terrace_embed",
            Self::RmsNorm => "terrace_rms_norm",
            Self::Product => "terrace_product",
            Self::Add => "terrace_add",
            Self::Place => "terrace_place",
            Self::Attend => "terrace_attend",
            Self::Silu => "terrace_silu",
            Self::Rows => "terrace_rows",
        }
    }

    /// The file that it is in.
    pub const fn source(self) -> Source {
        match self {
            Self::Gather16
            | Self::Gather4
            | Self::Gather1
            | Self::Scatter16
            | Self::Scatter4
            | Self::Scatter1 => Source::Move,
            Self::Checksum => Source::Checksum,
            Self::Embed
            | Self::RmsNorm
            | Self::Product
            | Self::Add
            | Self::Place
            | Self::Attend
            | Self::Silu
            | Self::Rows => Source::Engine,
        }
    }
}

/// Why kernels cannot run, or did not.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum KernelError {
    /// There is no such device, it is full or lost, or something on it failed.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The compiler of kernels is not installed, or too new for the driver.
    #[error("NVRTC cannot be used: {detail}")]
    NoNvrtc {
        /// Which file was looked for, or what was wrong with it.
        detail: String,
    },
    /// The host has no C++ compiler that builds the kernels.
    #[error("no C++ compiler builds the kernels for the host: {detail}")]
    NoCompiler {
        /// What was tried, and what it said.
        detail: String,
    },
    /// A source was refused.
    #[error("{what} does not compile: {log}")]
    Refused {
        /// The source.
        what: String,
        /// The compiler's words.
        log: String,
    },
    /// The device is too old for the PTX that we carry, and there is no NVRTC.
    #[error(
        "the kernels are built for compute capability {needed}, and the device has {found}; install NVRTC"
    )]
    TooOld {
        /// Of the PTX.
        needed: String,
        /// Of the device.
        found: String,
    },
    /// What was asked for does not fit the kernel. Nothing was launched.
    #[error("not a job for a kernel: {detail}")]
    BadJob {
        /// Why.
        detail: String,
    },
}

impl KernelError {
    fn bad(detail: impl Into<String>) -> Self {
        Self::BadJob { detail: detail.into() }
    }
}
