//! A Llama-family model on the CPU.
//!
//! Weights are packed to f16 when the file is opened; sums are f32. One forward
//! pass takes any mixture of sequences, a chunk of a prompt here and one token
//! there, reads the weights once for all of them, and gives each token the bits
//! that it would have had alone. K and V go to the sequence's blocks and are
//! read back from there.

mod device;
mod engine;
mod forward;
mod load;
mod measure;
#[cfg(test)]
mod on_device;
#[cfg(test)]
mod reference;
#[cfg(test)]
mod tests;

use std::path::Path;
use std::sync::atomic::AtomicBool;

use rayon::{ThreadPool, ThreadPoolBuilder};
use terrace_gpudirect::kernels::KernelError;
use thiserror::Error;

use crate::gguf::{Gguf, GgufError};
use crate::kernels::Isa;
use crate::kernels::gemm::PackedMatrix;
use crate::kv::{Geometry, KvSequence};

pub use device::DeviceModel;
pub use engine::{ComputeDevice, Engine};
pub use forward::Scratch;
pub use measure::{Measurement, measure};

/// Most tokens in one forward pass, over all sequences. More gain nothing: the
/// weights are read once per pass already, and cancellation waits for a layer.
pub const FORWARD_TOKENS_MAX: usize = 512;

/// Which arithmetic the blocks come from, for a space's manifest. It changes
/// whenever a change to the kernels changes bits. It names no instruction set,
/// because all of them give the same bits.
pub const ARITHMETIC: &str = "terrace-cpu-1";

/// The same for a device that was tried and gave other bits.
pub const DEVICE_ARITHMETIC: &str = "terrace-cuda-1";

/// Why a model could not be opened.
#[derive(Debug, Error)]
pub enum ModelError {
    /// The file itself was refused.
    #[error(transparent)]
    Gguf(#[from] GgufError),
    /// Another architecture.
    #[error("this file is of architecture {found}; terrace runs Llama-family models (llama)")]
    Architecture {
        /// What the file says.
        found: String,
    },
    /// A variation of the architecture that is not computed.
    #[error("this model needs {what}, which terrace does not compute; use a plain Llama model")]
    Unsupported {
        /// The variation.
        what: String,
    },
    /// A tensor is absent or of another shape than the metadata say.
    #[error("tensor {name} should be {rows} by {columns}: {found}; the file is not a complete model")]
    Tensor {
        /// The tensor.
        name: String,
        /// Rows that the metadata ask for.
        rows: usize,
        /// Columns that the metadata ask for.
        columns: usize,
        /// What the file has.
        found: String,
    },
    /// The pool of threads could not be started.
    #[error("cannot start {threads} threads: {error}")]
    Threads {
        /// How many.
        threads: usize,
        /// What the system said.
        error: rayon::ThreadPoolBuildError,
    },
}

/// Why a forward pass was refused. No sequence is longer than before.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum ForwardError {
    /// A token id that the model does not have.
    #[error("token {token} is outside the vocabulary of {vocabulary}")]
    UnknownToken {
        /// The id.
        token: u32,
        /// Ids that exist.
        vocabulary: usize,
    },
    /// More positions than the model was trained for.
    #[error("{tokens} tokens exceed the model's context of {context}")]
    ContextExceeded {
        /// Tokens of the sequence after the pass.
        tokens: usize,
        /// The limit.
        context: usize,
    },
    /// The sequence's blocks are full.
    #[error("{tokens} tokens do not fit the {capacity} that the sequence's blocks hold")]
    NoRoom {
        /// Tokens of the sequence after the pass.
        tokens: usize,
        /// Tokens that fit.
        capacity: usize,
    },
    /// The blocks have another shape than the model's.
    #[error("the sequence's blocks belong to another model")]
    WrongGeometry,
    /// Too much for one pass.
    #[error(
        "a pass takes 1 to {FORWARD_TOKENS_MAX} tokens and at least one of each sequence; it got {tokens}"
    )]
    BatchSize {
        /// Tokens of the whole pass.
        tokens: usize,
    },
    /// The sequence's blocks are in device memory, and the processor should compute.
    #[error("the sequence's blocks lie on a device; compute there")]
    OnDevice,
    /// The device failed, or is full.
    #[error(transparent)]
    Device(#[from] KernelError),
}

/// How a forward pass ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Outcome {
    /// Every token is in its sequence.
    Done,
    /// The caller cancelled it. The sequences are as long as before; what was
    /// written behind their ends is to be written again.
    Cancelled,
}

/// Whether a step needs the scores of the next token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WantLogits {
    /// No: a chunk in the middle of a prompt.
    No,
    /// After the step's last token.
    Last,
}

/// Some tokens of one sequence, at positions `kv.len()` and up.
pub struct Step<'a> {
    /// At least one token.
    pub tokens: &'a [u32],
    /// Where their K and V go.
    pub kv: &'a mut KvSequence,
    /// Whether scores are needed.
    pub logits: WantLogits,
}

/// How to run a model.
#[derive(Clone, Copy, Debug)]
pub struct ModelOptions {
    /// Threads that compute, at least one. They sleep between passes.
    pub threads: usize,
    /// Instruction set. It changes the speed, never the bits.
    pub isa: Isa,
}

impl ModelOptions {
    /// All processors that this process may use, and their best instructions.
    pub fn detect() -> Self {
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        Self { threads, isa: Isa::detect() }
    }
}

/// Sizes of a model.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Shape {
    /// Values of the residual stream.
    pub hidden: usize,
    /// Values between the two halves of the feed-forward part.
    pub feed_forward: usize,
    /// Query heads.
    pub heads: usize,
    /// Layers, key and value heads, values per head.
    pub kv: Geometry,
    /// Token ids.
    pub vocabulary: usize,
    /// Positions that the model was trained for.
    pub context: usize,
    /// Added below the root when normalising.
    pub epsilon: f32,
}

/// An opened model. It is immutable; any number of passes may run on it, each
/// with its own [`Scratch`], sharing its threads.
pub struct Model {
    shape: Shape,
    fingerprint: String,
    name: String,
    isa: Isa,
    pool: ThreadPool,
    layers: Vec<Layer>,
    embedding: PackedMatrix,
    /// Absent where the output is the embedding.
    output: Option<PackedMatrix>,
    output_norm: Vec<f32>,
    /// Turns per position of each pair of a head's values.
    frequencies: Vec<f64>,
}

struct Layer {
    attention_norm: Vec<f32>,
    /// Rows of queries, then keys, then values.
    attention_input: PackedMatrix,
    attention_output: PackedMatrix,
    forward_norm: Vec<f32>,
    /// Rows of gates, then of ups.
    forward_input: PackedMatrix,
    forward_output: PackedMatrix,
}

impl Model {
    /// Opens a model with [`ModelOptions::detect`].
    ///
    /// # Errors
    /// If the file is no complete Llama-family model in GGUF format.
    pub fn open(path: &Path) -> Result<Self, ModelError> {
        Self::open_with(path, ModelOptions::detect())
    }

    /// Opens a model: reads and packs all weights, which takes about a second
    /// per 500 million parameters and core.
    ///
    /// # Errors
    /// If the file is no complete Llama-family model in GGUF format.
    pub fn open_with(path: &Path, options: ModelOptions) -> Result<Self, ModelError> {
        let threads = options.threads;
        let pool = ThreadPoolBuilder::new()
            .num_threads(threads.max(1))
            .thread_name(|index| format!("model-{index}"))
            .build()
            .map_err(|error| ModelError::Threads { threads, error })?;
        load::load(&Gguf::open(path)?, options.isa, pool)
    }

    /// Sizes.
    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// Shape of its blocks.
    pub fn geometry(&self) -> Geometry {
        self.shape.kv
    }

    /// Identity of the file's contents; see [`Gguf::fingerprint`].
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    /// The model's own name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Instruction set in use.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// Threads that compute.
    pub fn threads(&self) -> usize {
        self.pool.current_num_threads()
    }

    /// Bytes of packed weights that one pass over a single token reads.
    pub fn weight_bytes(&self) -> usize {
        let layers = self.layers.iter().map(|layer| {
            layer.attention_input.bytes()
                + layer.attention_output.bytes()
                + layer.forward_input.bytes()
                + layer.forward_output.bytes()
        });
        layers.sum::<usize>() + self.output_matrix().bytes()
    }

    /// Runs some tokens of one sequence; see [`Model::forward_batch`].
    ///
    /// # Errors
    /// As [`Model::forward_batch`].
    pub fn forward(
        &self,
        scratch: &mut Scratch,
        tokens: &[u32],
        kv: &mut KvSequence,
        logits: WantLogits,
        cancel: &AtomicBool,
    ) -> Result<Outcome, ForwardError> {
        self.forward_batch(scratch, &mut [Step { tokens, kv, logits }], cancel)
    }

    /// Runs tokens of several sequences in one pass, on this model's threads.
    /// Scores are in [`Scratch::logits`] afterwards, by step. `cancel` is looked
    /// at before every layer.
    ///
    /// # Errors
    /// If a step does not fit the model or its blocks; then nothing was computed.
    pub fn forward_batch(
        &self,
        scratch: &mut Scratch,
        steps: &mut [Step<'_>],
        cancel: &AtomicBool,
    ) -> Result<Outcome, ForwardError> {
        self.check(steps)?;
        if steps.iter().any(|step| step.kv.needs_device()) {
            return Err(ForwardError::OnDevice);
        }
        Ok(self.pool.install(|| forward::forward(self, scratch, steps, cancel)))
    }

    fn output_matrix(&self) -> &PackedMatrix {
        self.output.as_ref().unwrap_or(&self.embedding)
    }

    fn check(&self, steps: &[Step<'_>]) -> Result<(), ForwardError> {
        let total: usize = steps.iter().map(|step| step.tokens.len()).sum();
        if total == 0 || total > FORWARD_TOKENS_MAX || steps.iter().any(|step| step.tokens.is_empty()) {
            return Err(ForwardError::BatchSize { tokens: total });
        }
        for step in steps {
            if step.kv.geometry() != self.shape.kv {
                return Err(ForwardError::WrongGeometry);
            }
            let vocabulary = self.shape.vocabulary;
            let inside = |token: &u32| usize::try_from(*token).is_ok_and(|token| token < vocabulary);
            if let Some(&token) = step.tokens.iter().find(|token| !inside(token)) {
                return Err(ForwardError::UnknownToken { token, vocabulary });
            }
            let tokens = step.kv.len() + step.tokens.len();
            if tokens > self.shape.context {
                return Err(ForwardError::ContextExceeded { tokens, context: self.shape.context });
            }
            if tokens > step.kv.capacity() {
                return Err(ForwardError::NoRoom { tokens, capacity: step.kv.capacity() });
            }
        }
        Ok(())
    }
}
