//! One request's tokens and the blocks that hold their K and V.
//!
//! The prefix comes from the store, in place. What is missing is computed
//! straight into leased frames and sealed block by block. Where the store has
//! nothing to give (it is away, full, or slow) the tokens are computed into
//! private memory: a request never fails because of the cache. Generated blocks
//! get their key only with their last token, so they grow in private memory and
//! are copied into a frame when they are whole.
//!
//! Before anything that was computed leaves, the fences of all blocks that were
//! read are checked; if one has moved, the sequence starts again from its tokens.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use terrace_client::Leased;
use terrace_core::{TokenCount, chain_key};

use crate::kernels::memory::{ReadBytes, WriteBytes};
use crate::kv::{BLOCK_TOKENS, Geometry, KvSequence};
use crate::model::WantLogits;
use crate::service::compute::Compute;
use crate::service::load::{Load, Waiting};
use crate::service::store::{Attached, Place, PrefixLease, Store, WriteFrames};

// Prompt tokens per pass: long enough to keep the cores busy, short enough that a
// cancelled request stops soon and that blocks are sealed while prefill goes on.
const CHUNK_TOKENS: usize = 128;

// A sequence that loses its blocks again and again is computed without the store.
const RESTARTS_MAX: u32 = 3;

const PER_BLOCK: TokenCount = TokenCount::new(16);
const _: () = assert!(PER_BLOCK.get() as usize == BLOCK_TOKENS);

/// What a sequence needs from its worker.
pub(crate) struct Shared {
    /// Computes.
    pub(crate) compute: Compute,
    /// The cache.
    pub(crate) store: Store,
    /// Counts.
    pub(crate) load: Arc<Load>,
    /// Shape of the blocks.
    pub(crate) geometry: Geometry,
}

/// Why a sequence ended early.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SequenceError {
    /// The worker is stopping.
    #[error("the worker is stopping; send the request to another one")]
    Stopping,
    /// The model refused the tokens.
    #[error("{0}")]
    Refused(String),
}

/// A leased frame among the blocks.
struct Filling {
    /// Index of the block in the sequence.
    block: usize,
    frames: WriteFrames,
    /// Position in the lease.
    position: usize,
}

/// One request's tokens and blocks.
pub(crate) struct Sequence {
    shared: Arc<Shared>,
    cancel: Arc<AtomicBool>,
    tokens: Vec<u32>,
    /// Chain key of each whole block of `tokens`.
    keys: Vec<[u8; 16]>,
    kv: KvSequence,
    attached: Option<Attached>,
    prefix: Option<PrefixLease>,
    /// Leased frames that are being filled.
    filling: Vec<Filling>,
    /// Guards of the blocks that were sealed here and are still read.
    written: Vec<Leased>,
    /// Blocks from here on are not in the store yet.
    sealed: usize,
    loaded_tokens: usize,
    restarts: u32,
}

impl Drop for Sequence {
    fn drop(&mut self) {
        // A pass that still runs for this request alone may stop at the next layer.
        self.cancel.store(true, Ordering::Relaxed);
    }
}

impl Sequence {
    /// Leases what the store has of a prompt. `tokens` is not empty.
    pub(crate) async fn open(shared: Arc<Shared>, tokens: Vec<u32>) -> Self {
        assert!(!tokens.is_empty(), "a prompt has at least one token");
        let keys = terrace_core::chain_keys(&tokens, PER_BLOCK);
        let kv = KvSequence::new(shared.geometry);
        let cancel = Arc::new(AtomicBool::new(false));
        let mut sequence = Self {
            shared,
            cancel,
            tokens,
            keys,
            kv,
            attached: None,
            prefix: None,
            filling: Vec::new(),
            written: Vec::new(),
            sealed: 0,
            loaded_tokens: 0,
            restarts: 0,
        };
        sequence.load_prefix().await;
        sequence.loaded_tokens = sequence.kv.len();
        sequence.shared.load.metrics.tokens_cached.inc_by(sequence.loaded_tokens as u64);
        sequence
    }

    /// Tokens of the prompt whose blocks came from the store.
    pub(crate) fn loaded_tokens(&self) -> usize {
        self.loaded_tokens
    }

    /// Whether there is a store to seal blocks in.
    pub(crate) fn has_store(&self) -> bool {
        self.attached.is_some()
    }

    /// Computes what is missing of the tokens and seals whole blocks. Returns the
    /// scores of the next token if they are wanted.
    pub(crate) async fn compute(
        &mut self,
        want: WantLogits,
        mut waiting: Option<&mut Waiting<'_>>,
    ) -> Result<Option<Vec<f32>>, SequenceError> {
        loop {
            let logits = self.compute_once(want, waiting.as_deref_mut()).await?;
            if self.fences_hold() {
                self.seal_whole().await;
                return Ok(logits);
            }
            self.restart().await;
        }
    }

    /// Appends a generated token.
    pub(crate) fn push(&mut self, token: u32) {
        self.tokens.push(token);
        if self.tokens.len().is_multiple_of(BLOCK_TOKENS) {
            let parent = self.keys.last().copied().unwrap_or_default();
            self.keys.push(chain_key(&parent, &self.tokens[self.tokens.len() - BLOCK_TOKENS..]));
        }
    }

    async fn compute_once(
        &mut self,
        want: WantLogits,
        mut waiting: Option<&mut Waiting<'_>>,
    ) -> Result<Option<Vec<f32>>, SequenceError> {
        // The store keeps no logits: a prompt that it knows in full computes its
        // last token again. What that would store is dropped, the block is sealed.
        if self.kv.len() >= self.tokens.len() && want == WantLogits::Last {
            self.kv.rewind(self.tokens.len() - 1);
        }
        let mut logits = None;
        while self.kv.len() < self.tokens.len() {
            let from = self.kv.len();
            let to = self.tokens.len().min(from + CHUNK_TOKENS);
            self.make_room(to).await;
            let last = to == self.tokens.len();
            let wanted = if last { want } else { WantLogits::No };
            logits = self.pass(from, to, wanted).await?;
            if let Some(waiting) = waiting.as_deref_mut() {
                waiting.left(self.tokens.len() - to);
            }
            if !last && self.fences_hold() {
                self.seal_whole().await;
            }
        }
        Ok(logits)
    }

    async fn pass(
        &mut self,
        from: usize,
        to: usize,
        want: WantLogits,
    ) -> Result<Option<Vec<f32>>, SequenceError> {
        let empty = KvSequence::new(self.shared.geometry);
        let kv = std::mem::replace(&mut self.kv, empty);
        let tokens = self.tokens[from..to].to_vec();
        let cancel = Arc::clone(&self.cancel);
        let computed =
            self.shared.compute.run(kv, tokens, want, cancel).await.ok_or(SequenceError::Stopping)?;
        self.kv = computed.kv;
        match computed.refused {
            Some(reason) => Err(SequenceError::Refused(reason)),
            None => Ok(computed.logits),
        }
    }

    /// Leases the longest prefix that the store can give in time.
    async fn load_prefix(&mut self) {
        if self.keys.is_empty() || self.restarts > RESTARTS_MAX {
            return;
        }
        self.attached = self.shared.store.attach().await;
        let Some(attached) = &self.attached else { return };
        let Some(prefix) = attached.lease_prefix(&self.keys).await else { return };
        for bytes in prefix.blocks() {
            let pushed = match bytes {
                Place::Host(bytes) => self.kv.push_read(bytes),
                Place::Device(bytes) => self.kv.push_device_read(bytes),
            };
            if pushed.is_err() {
                break;
            }
        }
        let on_device = (0..self.kv.blocks()).filter(|index| self.kv.lies_on_device(*index)).count();
        self.shared.load.metrics.blocks_on_device.inc_by(on_device as u64);
        self.sealed = self.kv.blocks();
        self.prefix = Some(prefix);
    }

    /// Blocks for tokens up to `to`: leased frames for whole prompt blocks,
    /// private memory for the rest.
    async fn make_room(&mut self, to: usize) {
        let first = self.kv.blocks();
        let whole = to.div_ceil(BLOCK_TOKENS).min(self.keys.len());
        if first < whole
            && let Some(attached) = &self.attached
        {
            let parent = first.checked_sub(1).map(|index| self.keys[index]);
            let leased = attached.lease_write(&self.keys[first..whole], parent).await;
            if let Some(frames) = leased {
                for at in 0..whole - first {
                    let pushed = match frames.take(at).await {
                        Some(Place::Host(bytes)) => self.kv.push_write(bytes).is_ok(),
                        Some(Place::Device(bytes)) => {
                            self.shared.load.metrics.blocks_on_device.inc();
                            self.kv.push_device_write(bytes).is_ok()
                        }
                        None => false,
                    };
                    if pushed {
                        self.filling.push(Filling {
                            block: first + at,
                            frames: frames.clone(),
                            position: at,
                        });
                    } else {
                        self.push_private();
                    }
                }
            }
        }
        while self.kv.blocks() < to.div_ceil(BLOCK_TOKENS) {
            self.push_private();
        }
    }

    fn push_private(&mut self) {
        self.shared.load.metrics.blocks_private.inc();
        let bytes = WriteBytes::private(self.shared.geometry.block_bytes());
        // Its size is the geometry's own.
        if self.kv.push_write(bytes).is_err() {
            self.kv.reserve_private(self.kv.capacity() + BLOCK_TOKENS);
        }
    }

    /// Seals what has become whole. A block that cannot be sealed stays ours.
    async fn seal_whole(&mut self) {
        let Some(attached) = self.attached.clone() else { return };
        let whole = (self.kv.len() / BLOCK_TOKENS).min(self.keys.len());
        // Frames of one lease follow each other.
        let ready: Vec<Filling> = self.filling.extract_if(.., |filling| filling.block < whole).collect();
        let mut leased = vec![false; whole - self.sealed.min(whole)];
        for lease in ready.chunk_by(|a, b| a.frames.is_same(&b.frames)) {
            let positions: Vec<usize> = lease.iter().map(|filling| filling.position).collect();
            for filling in lease {
                // One of the two, wherever it lies.
                self.kv.freeze(filling.block);
                self.kv.freeze_on_device(filling.block);
                leased[filling.block - self.sealed] = true;
            }
            let (sealed, guards) = attached.seal(&lease[0].frames, &positions).await;
            self.shared.load.metrics.blocks_sealed.inc_by(sealed as u64);
            self.written.extend(guards);
        }
        for index in (self.sealed..whole).filter(|index| !leased[index - self.sealed]) {
            if let Some(bytes) = self.kv.freeze(index) {
                self.seal_copy(&attached, index, &bytes).await;
            }
        }
        self.sealed = self.sealed.max(whole);
    }

    /// Copies a block that grew in private memory into a frame, and seals it.
    async fn seal_copy(&self, attached: &Attached, index: usize, bytes: &ReadBytes) {
        let parent = index.checked_sub(1).map(|index| self.keys[index]);
        let Some(frames) = attached.lease_write(&self.keys[index..=index], parent).await else { return };
        if !frames.fill(0, &bytes.to_vec()).await {
            return;
        }
        let (sealed, _) = attached.seal(&frames, &[0]).await;
        self.shared.load.metrics.blocks_sealed.inc_by(sealed as u64);
    }

    fn fences_hold(&self) -> bool {
        self.prefix.as_ref().is_none_or(PrefixLease::is_valid) && self.written.iter().all(Leased::is_valid)
    }

    /// Forgets all blocks and begins again from the tokens.
    async fn restart(&mut self) {
        tracing::info!(tokens = self.tokens.len(), "a fence moved under a sequence; computing it again");
        self.shared.load.metrics.fences_moved.inc();
        self.restarts += 1;
        self.kv = KvSequence::new(self.shared.geometry);
        self.filling.clear();
        self.written.clear();
        self.prefix = None;
        self.attached = None;
        self.sealed = 0;
        if self.restarts > 1 {
            // The daemon may be on its way back.
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        self.load_prefix().await;
    }
}
