//! The same model on a device, over blocks that lie there.
//!
//! The kernels do the same correctly rounded operations in the same order as those
//! of the processor, so blocks and scores are the same bits, and workers of both
//! kinds may share a space. Whether that holds on the device at hand is tried when
//! the model is opened ([`DeviceModel::agrees`]), not believed.
//!
//! Blocks that were leased in device memory are read and written in place. For
//! blocks in host memory the model keeps a copy on the device: it is filled before
//! the first pass that needs it, and written back when the block is full.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use terrace_gpudirect::kernels::{KernelBytes, KernelError, KernelQueue};

use super::forward::turn_angles;
use super::{ForwardError, Model, Outcome, Scratch, Step, WantLogits};
use crate::kernels::device::{DeviceKernels, Floats, HEAD_DIM_MAX, PassTables, PassToken, Weights};
use crate::kernels::gemm::PackedMatrix;
use crate::kv::{BLOCK_TOKENS, KvSequence};

// Two blocks and one token: every kernel, a full block, a block that is begun.
const TRIAL_TOKENS: usize = 2 * BLOCK_TOKENS + 1;

/// A model with its weights on a device.
pub struct DeviceModel {
    host: Arc<Model>,
    kernels: DeviceKernels,
    layers: Vec<DeviceLayer>,
    embedding: Weights,
    output: Option<Weights>,
    output_norm: Floats,
    agrees: bool,
}

struct DeviceLayer {
    attention_norm: Floats,
    attention_input: Weights,
    attention_output: Weights,
    forward_norm: Floats,
    forward_input: Weights,
    forward_output: Weights,
}

impl DeviceModel {
    /// Copies the weights to the device, and computes some tokens there and here.
    ///
    /// # Errors
    /// What the device says, or that a head is too large for its kernel.
    pub fn new(host: Arc<Model>, queue: Arc<dyn KernelQueue>) -> Result<Self, ForwardError> {
        let head_dim = host.shape.kv.head_dim;
        if head_dim > HEAD_DIM_MAX {
            let detail = format!("heads of {head_dim} values; the kernel holds {HEAD_DIM_MAX}");
            return Err(KernelError::BadJob { detail }.into());
        }
        let kernels = DeviceKernels::new(queue);
        let matrix = |matrix: &PackedMatrix| {
            let (rows, columns) = matrix.shape();
            kernels.weights(matrix.as_bytes(), rows, columns)
        };
        let layer = |layer: &super::Layer| {
            Ok::<_, KernelError>(DeviceLayer {
                attention_norm: kernels.vector(&layer.attention_norm)?,
                attention_input: matrix(&layer.attention_input)?,
                attention_output: matrix(&layer.attention_output)?,
                forward_norm: kernels.vector(&layer.forward_norm)?,
                forward_input: matrix(&layer.forward_input)?,
                forward_output: matrix(&layer.forward_output)?,
            })
        };
        let layers = host.layers.iter().map(layer).collect::<Result<_, _>>()?;
        let embedding = matrix(&host.embedding)?;
        let output = host.output.as_ref().map(matrix).transpose()?;
        let output_norm = kernels.vector(&host.output_norm)?;
        let mut model = Self { layers, embedding, output, output_norm, host, kernels, agrees: false };
        model.agrees = model.trial()?;
        Ok(model)
    }

    /// The model that it is a copy of.
    pub fn host(&self) -> &Arc<Model> {
        &self.host
    }

    /// Where its kernels run.
    pub(crate) fn queue(&self) -> &Arc<dyn KernelQueue> {
        self.kernels.queue()
    }

    /// What computes.
    pub fn describe(&self) -> String {
        self.kernels.queue().describe()
    }

    /// Whether the device gave the processor's bits when the model was opened. Otherwise its blocks belong
    /// in a space of their own.
    pub fn agrees(&self) -> bool {
        self.agrees
    }

    fn trial(&self) -> Result<bool, ForwardError> {
        let vocabulary = u32::try_from(self.host.shape.vocabulary).unwrap_or(u32::MAX);
        let count = TRIAL_TOKENS.min(self.host.shape.context);
        let tokens: Vec<u32> = (0..).map(|at: u32| at.wrapping_mul(7919) % vocabulary).take(count).collect();
        let never = AtomicBool::new(false);
        let (mut here, mut there) = (Scratch::new(), Scratch::new());
        let run = |scratch: &mut Scratch, on_device: bool| {
            let mut kv = KvSequence::new(self.host.geometry());
            kv.reserve_private(count);
            let mut steps = [Step { tokens: &tokens, kv: &mut kv, logits: WantLogits::Last }];
            let outcome = if on_device {
                self.forward_batch(scratch, &mut steps, &never)?
            } else {
                self.host.forward_batch(scratch, &mut steps, &never)?
            };
            assert_eq!(outcome, Outcome::Done, "nobody cancels a trial");
            Ok::<_, ForwardError>(
                (0..count / BLOCK_TOKENS).map(|index| kv.block_to_vec(index)).collect::<Vec<_>>(),
            )
        };
        let blocks = (run(&mut here, false)?, run(&mut there, true)?);
        let bits = |scratch: &Scratch| -> Vec<u32> {
            scratch.logits(0).unwrap_or_default().iter().map(|score| score.to_bits()).collect()
        };
        Ok(blocks.0 == blocks.1 && bits(&here) == bits(&there))
    }

    /// As [`Model::forward_batch`], on the device. Host memory of a block is written when the block is full.
    ///
    /// # Errors
    /// As [`Model::forward_batch`], or what the device says. Then the sequences are as long as before.
    pub fn forward_batch(
        &self,
        scratch: &mut Scratch,
        steps: &mut [Step<'_>],
        cancel: &AtomicBool,
    ) -> Result<Outcome, ForwardError> {
        self.host.check(steps)?;
        let outcome = self.run(scratch, steps, cancel);
        // Nothing may use the blocks behind this call, however it ends.
        let ended = self.kernels.queue().wait();
        let outcome = outcome?;
        ended?;
        if outcome == Outcome::Done {
            self.write_back(steps)?;
            for step in steps {
                step.kv.advance(step.tokens.len());
            }
        }
        Ok(outcome)
    }

    fn run(
        &self,
        scratch: &mut Scratch,
        steps: &mut [Step<'_>],
        cancel: &AtomicBool,
    ) -> Result<Outcome, KernelError> {
        scratch.rows.clear();
        turn_angles(&self.host, scratch, steps);
        let tables = self.tables(scratch, steps)?;
        let shape = self.host.shape;
        let count = steps.iter().map(|step| step.tokens.len()).sum();
        let kernels = &self.kernels;
        let query_columns = shape.heads * shape.kv.head_dim;
        let residual = kernels.floats(count, shape.hidden)?;
        let normal = kernels.floats(count, shape.hidden)?;
        let added = kernels.floats(count, shape.hidden)?;
        let inputs = kernels.floats(count, query_columns + 2 * shape.kv.kv_heads * shape.kv.head_dim)?;
        let queries = kernels.floats(count, query_columns)?;
        let attended = kernels.floats(count, query_columns)?;
        let gates = kernels.floats(count, 2 * shape.feed_forward)?;
        let inner = kernels.floats(count, shape.feed_forward)?;
        kernels.embed(&self.embedding, &tables, &residual)?;
        for (index, layer) in self.layers.iter().enumerate() {
            if cancel.load(Ordering::Relaxed) {
                return Ok(Outcome::Cancelled);
            }
            kernels.rms_norm(&residual, &layer.attention_norm, shape.epsilon, &normal)?;
            kernels.product(&layer.attention_input, &normal, &inputs)?;
            kernels.place(&inputs, &tables, index, &queries)?;
            kernels.attend(&queries, &tables, index, &attended)?;
            kernels.product(&layer.attention_output, &attended, &added)?;
            kernels.add(&residual, &added)?;
            kernels.rms_norm(&residual, &layer.forward_norm, shape.epsilon, &normal)?;
            kernels.product(&layer.forward_input, &normal, &gates)?;
            kernels.silu(&gates, &inner)?;
            kernels.product(&layer.forward_output, &inner, &added)?;
            kernels.add(&residual, &added)?;
        }
        self.logits(scratch, steps, &residual)?;
        Ok(Outcome::Done)
    }

    /// Scores after the last token of every step that wants them.
    fn logits(
        &self,
        scratch: &mut Scratch,
        steps: &[Step<'_>],
        residual: &Floats,
    ) -> Result<(), KernelError> {
        let shape = self.host.shape;
        let last = scratch.take_rows(shape.vocabulary, steps);
        if last.is_empty() {
            return Ok(());
        }
        let rows = self.kernels.rows(residual, &last)?;
        let normal = self.kernels.floats(last.len(), shape.hidden)?;
        self.kernels.rms_norm(&rows, &self.output_norm, shape.epsilon, &normal)?;
        let scores = self.kernels.floats(last.len(), shape.vocabulary)?;
        self.kernels.product(self.output.as_ref().unwrap_or(&self.embedding), &normal, &scores)?;
        scratch.logits = self.kernels.read(&scores)?;
        Ok(())
    }

    fn tables(&self, scratch: &Scratch, steps: &mut [Step<'_>]) -> Result<PassTables, KernelError> {
        let mut tokens = Vec::new();
        let mut blocks = Vec::with_capacity(steps.len());
        for (sequence, step) in steps.iter_mut().enumerate() {
            let end = step.kv.len() + step.tokens.len();
            let count = end.div_ceil(BLOCK_TOKENS);
            blocks
                .push((0..count).map(|index| self.on_device(step.kv, index)).collect::<Result<Vec<_>, _>>()?);
            for (position, id) in (step.kv.len()..end).zip(step.tokens) {
                let stores = step.kv.is_writable(position / BLOCK_TOKENS);
                tokens.push(PassToken { id: *id, position, sequence, stores });
            }
        }
        let shape = self.host.shape;
        PassTables::new(&self.kernels, shape.kv, shape.vocabulary, &tokens, &blocks, &scratch.turns)
    }

    /// Where the device finds a block. What is known of one in host memory is copied the first time.
    fn on_device(&self, kv: &mut KvSequence, index: usize) -> Result<KernelBytes, KernelError> {
        if let Some(bytes) = kv.device_bytes(index) {
            return Ok(bytes.clone());
        }
        let bytes = self.kernels.queue().allocate(self.host.geometry().block_bytes())?;
        if index * BLOCK_TOKENS < kv.len()
            && let Some(known) = kv.block_to_vec(index)
        {
            self.kernels.queue().write(&bytes, &known)?;
        }
        kv.keep_on_device(index, bytes.clone());
        Ok(bytes)
    }

    /// Copies blocks that this pass has filled to their host memory, where they have one.
    fn write_back(&self, steps: &mut [Step<'_>]) -> Result<(), KernelError> {
        for step in steps {
            let (start, end) = (step.kv.len(), step.kv.len() + step.tokens.len());
            for index in start / BLOCK_TOKENS..end / BLOCK_TOKENS {
                if !step.kv.is_writable(index) {
                    continue;
                }
                let Some(bytes) = step.kv.device_bytes(index) else { continue };
                let mut filled = vec![0; bytes.len()];
                self.kernels.queue().read(bytes, &mut filled)?;
                step.kv.fill(index, &filled);
            }
        }
        Ok(())
    }
}
