//! K and V of one sequence: blocks in order, some leased, some being filled.
//!
//! One block is 16 tokens of all layers, one contiguous buffer of f16 laid out
//! `[layer][k or v][slot][kv head][dimension]`, keys after rotation. A layer
//! range is one contiguous piece, so layers can be streamed. Read-only blocks
//! (a prefix from the store) and writable ones (our own window frames, private
//! memory) are different types, and a store into a read-only block is dropped:
//! a sealed position that is computed again gives the same bits. A block lies in
//! host memory or on a device; one in host memory may have a copy on a device.

use terrace_gpudirect::kernels::KernelBytes;
use thiserror::Error;

use crate::kernels::memory::{BlockBases, ReadBytes, WriteBytes};

/// Tokens in a block.
pub const BLOCK_TOKENS: usize = 16;

/// The layout of a block, for a space's manifest. Two layouts never share blocks.
pub const LAYOUT: &str = "layer,kv,slot,head,dim;k-rotated";

/// Shape of a model's K and V.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Layers of the model.
    pub layers: usize,
    /// Heads that have keys and values of their own.
    pub kv_heads: usize,
    /// Values of one head.
    pub head_dim: usize,
}

impl Geometry {
    /// Bytes of one block.
    pub fn block_bytes(self) -> usize {
        self.layers * 2 * self.half_bytes()
    }

    /// Bytes from one slot to the next, within one layer's keys or values.
    pub(crate) fn slot_bytes(self) -> usize {
        self.kv_heads * self.head_dim * 2
    }

    fn half_bytes(self) -> usize {
        BLOCK_TOKENS * self.slot_bytes()
    }

    /// Offset of a layer's keys in a block.
    pub(crate) fn keys_at(self, layer: usize) -> usize {
        layer * 2 * self.half_bytes()
    }

    /// Offset of a layer's values in a block.
    pub(crate) fn values_at(self, layer: usize) -> usize {
        self.keys_at(layer) + self.half_bytes()
    }
}

/// Why a block was not taken.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum KvError {
    /// The space and the model disagree on the size of a block.
    #[error("a block of this model has {expected} bytes, not {found}: the space belongs to another model")]
    WrongBlockBytes {
        /// What the geometry says.
        expected: usize,
        /// What was given.
        found: usize,
    },
    /// A sealed block can only follow full ones.
    #[error("a sealed block starts at token {start}, but only {len} tokens are before it")]
    Gap {
        /// First position of the block.
        start: usize,
        /// Tokens that the sequence has.
        len: usize,
    },
}

/// One block of a sequence.
enum KvBlock {
    Read(ReadBytes),
    Write(WriteBytes),
    /// Sealed, on a device.
    DeviceRead(KernelBytes),
    /// To be filled, on a device.
    DeviceWrite(KernelBytes),
}

/// The blocks of one sequence, and how many tokens are in them.
pub struct KvSequence {
    geometry: Geometry,
    blocks: Vec<KvBlock>,
    /// Copies on a device of blocks in host memory, by block. A sealed block has the same bytes in both; of
    /// one that is filled there, the host has them when it is full.
    copies: Vec<Option<KernelBytes>>,
    len: usize,
}

impl KvSequence {
    /// A sequence without tokens.
    pub fn new(geometry: Geometry) -> Self {
        Self { geometry, blocks: Vec::new(), copies: Vec::new(), len: 0 }
    }

    /// Shape of the blocks.
    pub fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// Tokens whose K and V are in the blocks.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether no token has been computed or loaded.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Tokens that the blocks have room for.
    pub fn capacity(&self) -> usize {
        self.blocks.len() * BLOCK_TOKENS
    }

    /// Blocks, full or not.
    pub fn blocks(&self) -> usize {
        self.blocks.len()
    }

    /// Appends a sealed block: 16 more tokens are known.
    ///
    /// # Errors
    /// If its size is wrong, or the blocks before it are not full.
    pub fn push_read(&mut self, block: ReadBytes) -> Result<(), KvError> {
        self.check_bytes(block.len())?;
        if self.len != self.capacity() {
            return Err(KvError::Gap { start: self.capacity(), len: self.len });
        }
        self.blocks.push(KvBlock::Read(block));
        self.len += BLOCK_TOKENS;
        Ok(())
    }

    /// Appends room for 16 tokens.
    ///
    /// # Errors
    /// If its size is wrong.
    pub fn push_write(&mut self, block: WriteBytes) -> Result<(), KvError> {
        self.check_bytes(block.len())?;
        self.blocks.push(KvBlock::Write(block));
        Ok(())
    }

    /// Appends a sealed block that lies on a device.
    ///
    /// # Errors
    /// As [`KvSequence::push_read`].
    pub fn push_device_read(&mut self, block: KernelBytes) -> Result<(), KvError> {
        self.check_bytes(block.len())?;
        if self.len != self.capacity() {
            return Err(KvError::Gap { start: self.capacity(), len: self.len });
        }
        self.blocks.push(KvBlock::DeviceRead(block));
        self.len += BLOCK_TOKENS;
        Ok(())
    }

    /// Appends room for 16 tokens on a device.
    ///
    /// # Errors
    /// If its size is wrong.
    pub fn push_device_write(&mut self, block: KernelBytes) -> Result<(), KvError> {
        self.check_bytes(block.len())?;
        self.blocks.push(KvBlock::DeviceWrite(block));
        Ok(())
    }

    /// Appends private memory until `tokens` tokens fit.
    pub fn reserve_private(&mut self, tokens: usize) {
        while self.capacity() < tokens {
            self.blocks.push(KvBlock::Write(WriteBytes::private(self.geometry.block_bytes())));
        }
    }

    /// Forgets the tokens from `len` on, so that they are computed again. The
    /// blocks stay. A prompt that is fully known computes its last token again
    /// this way, because the store keeps no logits.
    ///
    /// # Panics
    /// If the sequence is shorter.
    pub fn rewind(&mut self, len: usize) {
        assert!(len <= self.len, "rewind goes back");
        self.len = len;
    }

    /// Whether block `index` is full but still writable, which is when it is to
    /// be sealed.
    pub fn is_sealable(&self, index: usize) -> bool {
        (index + 1) * BLOCK_TOKENS <= self.len && self.is_writable(index)
    }

    /// Whether tokens of block `index` are stored when they are computed.
    pub(crate) fn is_writable(&self, index: usize) -> bool {
        match self.blocks.get(index) {
            Some(KvBlock::Write(_) | KvBlock::DeviceWrite(_)) => true,
            Some(KvBlock::Read(_) | KvBlock::DeviceRead(_)) | None => false,
        }
    }

    /// Whether a block lies in device memory, where the kernels of the processor cannot reach it.
    pub(crate) fn needs_device(&self) -> bool {
        (0..self.blocks.len()).any(|index| self.lies_on_device(index))
    }

    /// Whether block `index` itself lies in device memory.
    pub(crate) fn lies_on_device(&self, index: usize) -> bool {
        matches!(self.blocks.get(index), Some(KvBlock::DeviceRead(_) | KvBlock::DeviceWrite(_)))
    }

    /// Block `index` on a device, if it is there.
    pub(crate) fn device_bytes(&self, index: usize) -> Option<&KernelBytes> {
        match self.blocks.get(index)? {
            KvBlock::DeviceRead(bytes) | KvBlock::DeviceWrite(bytes) => Some(bytes),
            KvBlock::Read(_) | KvBlock::Write(_) => self.copies.get(index)?.as_ref(),
        }
    }

    /// Remembers the copy on a device of a block in host memory.
    pub(crate) fn keep_on_device(&mut self, index: usize, copy: KernelBytes) {
        if self.copies.len() <= index {
            self.copies.resize(index + 1, None);
        }
        self.copies[index] = Some(copy);
    }

    /// Takes the bytes of a block that was filled on a device. One that lies there or is sealed stays.
    pub(crate) fn fill(&mut self, index: usize, bytes: &[u8]) {
        match &mut self.blocks[index] {
            KvBlock::Write(target) => target.copy_from(bytes),
            KvBlock::Read(_) | KvBlock::DeviceRead(_) | KvBlock::DeviceWrite(_) => {}
        }
    }

    /// Makes a full block on a device read-only and returns it; nothing if it is not full or not there.
    pub fn freeze_on_device(&mut self, index: usize) -> Option<KernelBytes> {
        if (index + 1) * BLOCK_TOKENS > self.len {
            return None;
        }
        let block = self.blocks.get_mut(index)?;
        let (KvBlock::DeviceRead(bytes) | KvBlock::DeviceWrite(bytes)) = block else { return None };
        let bytes = bytes.clone();
        *block = KvBlock::DeviceRead(bytes.clone());
        Some(bytes)
    }

    /// Makes a full block in host memory read-only and returns it; nothing if it is not full or not there.
    pub fn freeze(&mut self, index: usize) -> Option<ReadBytes> {
        if (index + 1) * BLOCK_TOKENS > self.len {
            return None;
        }
        let block = self.blocks.get_mut(index)?;
        let placeholder = KvBlock::Write(WriteBytes::private(0));
        let bytes = match std::mem::replace(block, placeholder) {
            KvBlock::Read(bytes) => bytes,
            KvBlock::Write(bytes) => bytes.freeze(),
            there @ (KvBlock::DeviceRead(_) | KvBlock::DeviceWrite(_)) => {
                *block = there;
                return None;
            }
        };
        *block = KvBlock::Read(bytes.clone());
        Some(bytes)
    }

    /// A copy of the bytes of block `index`; nothing if it lies on a device.
    pub fn block_to_vec(&self, index: usize) -> Option<Vec<u8>> {
        Some(match self.blocks.get(index)? {
            KvBlock::Read(bytes) => bytes.to_vec(),
            KvBlock::Write(bytes) => bytes.to_vec(),
            KvBlock::DeviceRead(_) | KvBlock::DeviceWrite(_) => return None,
        })
    }

    /// Stores one token's keys and values of one layer. A sealed block stays as
    /// it is.
    pub(crate) fn store(&mut self, layer: usize, position: usize, keys: &[u16], values: &[u16]) {
        let geometry = self.geometry;
        let slot = position % BLOCK_TOKENS * geometry.slot_bytes();
        match &mut self.blocks[position / BLOCK_TOKENS] {
            KvBlock::Read(_) => {}
            KvBlock::DeviceRead(_) | KvBlock::DeviceWrite(_) => {
                unreachable!("a pass of the processor is refused where blocks lie on a device")
            }
            KvBlock::Write(bytes) => {
                bytes.write(geometry.keys_at(layer) + slot, keys);
                bytes.write(geometry.values_at(layer) + slot, values);
            }
        }
    }

    /// Counts `tokens` more tokens as stored.
    pub(crate) fn advance(&mut self, tokens: usize) {
        self.len += tokens;
        assert!(self.len <= self.capacity(), "tokens lie in blocks");
    }

    /// Addresses of all blocks, for the kernels.
    pub(crate) fn bases(&self) -> BlockBases<'_> {
        let blocks = self.blocks.iter().map(|block| match block {
            KvBlock::Read(bytes) => bytes.base(),
            KvBlock::Write(bytes) => bytes.base(),
            KvBlock::DeviceRead(_) | KvBlock::DeviceWrite(_) => {
                unreachable!("a pass of the processor is refused where blocks lie on a device")
            }
        });
        BlockBases::new(self.geometry.block_bytes(), blocks)
    }

    fn check_bytes(&self, found: usize) -> Result<(), KvError> {
        let expected = self.geometry.block_bytes();
        if found == expected { Ok(()) } else { Err(KvError::WrongBlockBytes { expected, found }) }
    }
}
