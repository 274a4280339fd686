//! Where an element lies, in a block of ours and in an engine's pages.
//!
//! An engine keeps, for each layer, keys and values in pages of some slots. Where
//! an element lies is said by three strides and two addresses a layer, which covers
//! what vLLM and SGLang do: K and V in one tensor or two, a page's slots before its
//! heads (NHD) or behind (HND), or K and V next to each other in every row.

use super::KernelError;
use super::queue::KernelBytes;

/// Shape of a block, `[layer][k or v][slot][kv head][dimension]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockShape {
    /// Layers.
    pub layers: u32,
    /// Tokens of a block.
    pub slots: u32,
    /// Heads that have keys and values of their own, on this device.
    pub kv_heads: u32,
    /// Elements of a head.
    pub head_dim: u32,
    /// 2 for f16 and bf16, 1 for fp8.
    pub element_bytes: u32,
}

impl BlockShape {
    /// Bytes of a head of a slot.
    pub fn row_bytes(self) -> u64 {
        u64::from(self.head_dim) * u64::from(self.element_bytes)
    }

    /// Bytes of the keys, or the values, of one layer.
    pub fn half_bytes(self) -> u64 {
        u64::from(self.slots) * u64::from(self.kv_heads) * self.row_bytes()
    }

    /// Bytes of a block.
    pub fn block_bytes(self) -> u64 {
        2 * u64::from(self.layers) * self.half_bytes()
    }
}

/// Where an element lies in the pages of one layer, in bytes. Elements of a row follow each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageLayout {
    /// Pages of a layer.
    pub pages: u32,
    /// Slots of a page.
    pub page_slots: u32,
    /// From one page to the next.
    pub page_stride: u64,
    /// From one slot of a page to the next.
    pub slot_stride: u64,
    /// From one head of a slot to the next.
    pub head_stride: u64,
    /// From the first key to the first value of a layer in one tensor.
    pub value_offset: u64,
}

impl PageLayout {
    /// `[page][slot][head][dim]`, K and V in two tensors (SGLang), or one behind the other in a tensor
    /// `[2][page][slot][head][dim]` (vLLM's FlashAttention of old).
    pub fn nhd_apart(shape: BlockShape, pages: u32, page_slots: u32) -> Self {
        let slot_stride = u64::from(shape.kv_heads) * shape.row_bytes();
        let page_stride = u64::from(page_slots) * slot_stride;
        let value_offset = u64::from(pages) * page_stride;
        Self { pages, page_slots, page_stride, slot_stride, head_stride: shape.row_bytes(), value_offset }
    }

    /// `[page][2][slot][head][dim]` (vLLM, NHD).
    pub fn nhd_together(shape: BlockShape, pages: u32, page_slots: u32) -> Self {
        let apart = Self::nhd_apart(shape, pages, page_slots);
        Self { page_stride: 2 * apart.page_stride, value_offset: apart.page_stride, ..apart }
    }

    /// `[page][head][slot][dim]`, K and V in two tensors or one behind the other.
    pub fn hnd_apart(shape: BlockShape, pages: u32, page_slots: u32) -> Self {
        let apart = Self::nhd_apart(shape, pages, page_slots);
        let slot_stride = shape.row_bytes();
        Self { slot_stride, head_stride: u64::from(page_slots) * slot_stride, ..apart }
    }

    /// `[page][2][head][slot][dim]` (vLLM, HND).
    pub fn hnd_together(shape: BlockShape, pages: u32, page_slots: u32) -> Self {
        let apart = Self::hnd_apart(shape, pages, page_slots);
        Self { page_stride: 2 * apart.page_stride, value_offset: apart.page_stride, ..apart }
    }

    /// `[page][head][slot][2][dim]`: the view of every layer that vLLM has had since 0.32.
    pub fn hnd_rows_together(shape: BlockShape, pages: u32, page_slots: u32) -> Self {
        let apart = Self::hnd_apart(shape, pages, page_slots);
        Self {
            page_stride: 2 * apart.page_stride,
            slot_stride: 2 * apart.slot_stride,
            head_stride: 2 * apart.head_stride,
            value_offset: shape.row_bytes(),
            ..apart
        }
    }

    /// Bytes from the first of its keys, or values, to behind the last.
    pub(super) fn extent(self, shape: BlockShape) -> Option<u64> {
        let last = |count: u32, stride: u64| u64::from(count.checked_sub(1)?).checked_mul(stride);
        last(self.pages, self.page_stride)?
            .checked_add(last(self.page_slots, self.slot_stride)?)?
            .checked_add(last(shape.kv_heads, self.head_stride)?)?
            .checked_add(shape.row_bytes())
    }
}

/// The pages of an engine.
#[derive(Clone, Debug)]
pub struct EnginePages {
    /// Where elements lie.
    pub layout: PageLayout,
    /// Keys and values of every layer; the memory is at least as long as the layout says.
    pub layers: Vec<[KernelBytes; 2]>,
}

impl EnginePages {
    /// Pages where K and V of a layer lie in one tensor.
    ///
    /// # Errors
    /// If a tensor is too short for the layout's [`PageLayout::value_offset`].
    pub fn in_one_tensor(layout: PageLayout, layers: &[KernelBytes]) -> Result<Self, KernelError> {
        let offset = usize::try_from(layout.value_offset).map_err(|_| KernelError::bad("value offset"))?;
        let halves = |bytes: &KernelBytes| {
            let length = bytes.len().checked_sub(offset);
            let length = length.ok_or_else(|| KernelError::bad("values begin behind the tensor"))?;
            Ok::<_, KernelError>([bytes.clone(), bytes.part(offset, length)?])
        };
        Ok(Self { layout, layers: layers.iter().map(halves).collect::<Result<_, _>>()? })
    }
}
