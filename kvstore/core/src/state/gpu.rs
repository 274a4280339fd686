//! Devices of the Hbm tier: what each holds, in a table of its own, so that a
//! node without any pays nothing, and one block may be on several.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use crate::api::IoClass;
use crate::cost::Load;
use crate::gpu_config::GpuConfig;
use crate::ids::{FrameRef, GpuId, OpId, SessionId};
use crate::policy::queues::Links;
use crate::state::block::BlockIndex;
use crate::state::count;
use crate::state::index::Index;
use crate::state::session::WaitId;
use crate::units::Now;
use crate::urgency::Wanted;

/// How a copy that may be served is on its way to a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Coming {
    No,
    /// In the device's queue of wanted blocks of this class.
    Queued(IoClass),
    /// It comes to Pinned first.
    Below(IoClass),
    /// Being copied, or read from a device of Nvme.
    Moving(OpId),
    /// Its copy here is being compared with its checksum.
    Verifying(OpId),
}

/// What a device knows of a block: it is there while a copy is here or on its
/// way, or a child's is here.
#[derive(Debug)]
pub(crate) struct Entry {
    pub(crate) block: BlockIndex,
    /// The sealed copy.
    pub(crate) frame: Option<FrameRef>,
    pub(crate) links: Links,
    /// Blocks that name this one as their parent and are sealed here.
    pub(crate) children: u32,
    pub(crate) coming: Coming,
    /// It came to Pinned for this device once already, since it was wanted here.
    pub(crate) fetched: bool,
}

/// All entries of one device.
#[derive(Debug, Default)]
pub(crate) struct Entries {
    slots: Vec<Option<Entry>>,
    free: Vec<u32>,
    index: Index,
}

/// Places are counted: spread over all tags, each its own.
fn tag(block: BlockIndex) -> u32 {
    block.get().wrapping_mul(0x9e37_79b1)
}

impl Entries {
    pub(crate) fn find(&self, block: BlockIndex) -> Option<u32> {
        self.index.find(tag(block), |_| true)
    }

    pub(crate) fn of(&self, block: BlockIndex) -> Option<&Entry> {
        self.slots[self.find(block)? as usize].as_ref()
    }

    pub(crate) fn of_mut(&mut self, block: BlockIndex) -> Option<&mut Entry> {
        let slot = self.find(block)?;
        self.slots[slot as usize].as_mut()
    }

    /// An entry in use.
    pub(crate) fn at(&self, slot: u32) -> &Entry {
        self.slots[slot as usize].as_ref().expect("an entry is used only while it is there")
    }

    pub(crate) fn at_mut(&mut self, slot: u32) -> &mut Entry {
        self.slots[slot as usize].as_mut().expect("an entry is used only while it is there")
    }

    /// The block's entry, a new one if it has none.
    pub(crate) fn enter(&mut self, block: BlockIndex) -> u32 {
        if let Some(slot) = self.find(block) {
            return slot;
        }
        let slot = self.free.pop().unwrap_or_else(|| {
            self.slots.push(None);
            count(self.slots.len() - 1)
        });
        let entry = Entry {
            block,
            frame: None,
            links: Links::default(),
            children: 0,
            coming: Coming::No,
            fetched: false,
        };
        self.slots[slot as usize] = Some(entry);
        self.index.insert(tag(block), slot);
        slot
    }

    /// Takes an entry out that says nothing any more.
    pub(crate) fn settle(&mut self, block: BlockIndex) {
        let Some(slot) = self.find(block) else { return };
        let entry = self.at(slot);
        if entry.frame.is_some() || entry.children > 0 || entry.coming != Coming::No {
            return;
        }
        assert!(!entry.links.is_listed(), "a block without a copy here is in no list");
        self.index.remove(tag(block), slot, None);
        self.slots[slot as usize] = None;
        self.free.push(slot);
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &Entry> {
        self.slots.iter().flatten()
    }
}

/// One device.
#[derive(Debug)]
pub(crate) struct Gpu {
    pub(crate) config: GpuConfig,
    pub(crate) usable: bool,
    pub(crate) entries: Entries,
    /// Chunks alive, of any kind.
    pub(crate) chunks: u32,
    /// Copies to and from it, and verifications on it.
    pub(crate) running: u32,
    /// How fast the host fills it.
    pub(crate) load: Load,
    /// Faults since start.
    pub(crate) faults: u64,
    /// Blocks to bring here, and those of them that wait for a frame or for their turn on a device.
    pub(crate) wanted: Wanted,
    pub(crate) stalled: VecDeque<BlockIndex>,
    /// Read leases that wait for a block here: request and position in it.
    pub(crate) arrivals: BTreeMap<BlockIndex, Vec<(WaitId, u32)>>,
    /// What the engines beside it need, by their sessions.
    pub(crate) claims: BTreeMap<SessionId, u64>,
    /// Requests that wait for memory to be given back.
    pub(crate) shrinks: BTreeSet<WaitId>,
    pub(crate) create_paused_until: Now,
}

impl Gpu {
    fn new(config: GpuConfig) -> Self {
        Self {
            config,
            usable: true,
            entries: Entries::default(),
            chunks: 0,
            running: 0,
            load: Load::new(),
            faults: 0,
            wanted: Wanted::default(),
            stalled: VecDeque::new(),
            arrivals: BTreeMap::new(),
            claims: BTreeMap::new(),
            shrinks: BTreeSet::new(),
            create_paused_until: Now::default(),
        }
    }

    /// Bytes that its chunks may take now.
    pub(crate) fn limit(&self) -> u64 {
        let claimed = self.claims.values().fold(0u64, |sum, bytes| sum.saturating_add(*bytes));
        let bytes = self.config.bytes.get();
        bytes.saturating_sub(claimed).max(self.config.bytes_min.get().min(bytes))
    }
}

/// All devices of the tier.
#[derive(Debug)]
pub(crate) struct Gpus(Vec<Gpu>);

impl Gpus {
    pub(crate) fn new(configs: &[GpuConfig]) -> Self {
        assert!(
            configs.len() <= usize::from(crate::ids::GPUS_MAX),
            "the tier has at most {}",
            crate::ids::GPUS_MAX
        );
        Self(configs.iter().map(|&config| Gpu::new(config)).collect())
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }

    pub(crate) fn ids(&self) -> impl Iterator<Item = GpuId> + use<> {
        (0..crate::ids::GPUS_MAX).take(self.0.len()).map(GpuId::new)
    }

    pub(crate) fn find(&self, gpu: GpuId) -> Option<&Gpu> {
        self.0.get(usize::from(gpu.get()))
    }

    pub(crate) fn at(&self, gpu: GpuId) -> &Gpu {
        &self.0[usize::from(gpu.get())]
    }

    pub(crate) fn at_mut(&mut self, gpu: GpuId) -> &mut Gpu {
        &mut self.0[usize::from(gpu.get())]
    }
}
