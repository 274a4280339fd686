//! One device that was opened, with its threads.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use terrace_core::{BlockHeader, ByteCount, ChunkId, DeviceId, Done, Fault, FrameRef, GpuId, IoClass, OpId};
use terrace_gpudirect::{
    Copies, CopyCounts, CopyLimits, Device, DeviceError, HostBytes, Job, Piece, Pinned, SLICE_BYTES, Sums,
};

use super::direct::Direct;
use super::landing::{self, Check, Landing, Next, Place, Transfer};
use super::maker::{Last, Maker, Snapshot, Wish};
use super::{Finish, Table};
use crate::config::UseGds;

/// A copy that takes longer is a failure. Its frames stay taken until the device is done with them.
const COPY_WITHIN: Duration = Duration::from_secs(10);

/// A payload that is only looked at; chunks that are made before it take some milliseconds each.
const SNAPSHOT_WITHIN: Duration = Duration::from_secs(5);

/// Longest wait for a driver when the daemon ends.
const END_WITHIN: Duration = Duration::from_secs(3);

/// See the module.
pub(crate) struct Gpu {
    device: Arc<dyn Device>,
    pinned: Arc<Pinned>,
    copies: Arc<Copies>,
    landing: Arc<Landing>,
    wishes: Sender<Wish>,
    sums: String,
    direct: Result<Direct, DeviceError>,
    alive: Arc<AtomicU64>,
    /// Says when the thread that makes chunks has ended.
    ended: Mutex<Receiver<()>>,
}

/// What a device does.
#[derive(Default)]
pub(crate) struct Activity {
    pub(crate) copies: CopyCounts,
    pub(crate) registered: ByteCount,
    pub(crate) chunks: u64,
    pub(crate) direct_reads: u64,
    pub(crate) fallen_back: u64,
}

impl Gpu {
    pub(crate) fn start(
        id: GpuId,
        device: Arc<dyn Device>,
        bytes: ByteCount,
        table: Arc<Table>,
        finish: &Finish,
        lost: Arc<dyn Fn() + Send + Sync>,
    ) -> Result<Self, DeviceError> {
        let total = device.info().bytes;
        if bytes > total {
            let what = format!("hbm.bytes of {} where it has {} in all", bytes.get(), total.get());
            return Err(DeviceError::Unsupported { what });
        }
        let sums = Sums::open(&device)?;
        let described = sums.describe();
        let (checks, checked) = channel();
        let (wishes, wished) = channel();
        let (ends_then, ended) = channel();
        let alive = Arc::new(AtomicU64::new(0));
        let landing = Arc::new(Landing::new(checks, lost));
        let pinned = Arc::new(Pinned::new(Arc::clone(&device), SLICE_BYTES));
        let ends = Arc::clone(&landing) as _;
        let copies = Copies::start(Arc::clone(&device), Arc::clone(&pinned), CopyLimits::ONE_LINK, ends)?;
        let maker = Maker {
            gpu: id,
            device: Arc::clone(&device),
            pinned: Arc::clone(&pinned),
            table,
            landing: Arc::clone(&landing),
            finish: Arc::clone(finish),
            alive: Arc::clone(&alive),
        };
        spawn(format!("hbm-make-{id}"), move || {
            maker.run(&wished);
            drop(ends_then);
        })?;
        let (told, finish) = (Arc::clone(&landing), Arc::clone(finish));
        spawn(format!("hbm-check-{id}"), move || landing::run(&checked, &sums, &told, &finish))?;
        let copies = Arc::new(copies);
        let (sums, ended) = (described, Mutex::new(ended));
        let direct = Err(DeviceError::Unsupported { what: "cuFile without files".to_owned() });
        Ok(Self { device, pinned, copies, landing, wishes, sums, direct, alive, ended })
    }

    /// Reads files by cuFile from now on, if it can be had.
    pub(crate) fn use_files(&mut self, wanted: UseGds, files: (&Path, &[PathBuf])) {
        self.direct = Direct::open(&self.device, wanted, files, &self.landing);
    }

    /// Whether it does.
    pub(crate) fn reads_files(&self) -> bool {
        self.direct.is_ok()
    }

    /// Reads from a file, or answers that it was not started.
    pub(crate) fn read(&self, op: OpId, source: (DeviceId, u64), target: Place, expect: BlockHeader) {
        match &self.direct {
            Ok(direct) => direct.read(op, source, target, expect, &self.landing),
            // The core was told at the start that there is no such way.
            Err(_) => self.answer(op, Err(Fault::NotStarted)),
        }
    }

    pub(crate) fn device(&self) -> &dyn Device {
        &*self.device
    }

    /// For the log.
    pub(crate) fn describe(&self) -> String {
        let info = self.device.info();
        let files = match &self.direct {
            Ok(direct) => direct.describe(),
            Err(error) => format!("no cuFile ({error})"),
        };
        format!("{} ({}); checksums {}; {files}", info.name, info.kind.label(), self.sums)
    }

    /// For `info`.
    pub(crate) fn note(&self) -> String {
        self.copies.lost().map_or_else(|| self.describe(), |error| error.to_string())
    }

    pub(crate) fn activity(&self) -> Activity {
        let (direct_reads, fallen_back) = self.direct.as_ref().map(Direct::counts).unwrap_or_default();
        Activity {
            direct_reads,
            fallen_back,
            copies: self.copies.counts(),
            registered: self.pinned.registered(),
            chunks: self.alive.load(Ordering::Relaxed),
        }
    }

    fn wish(&self, wish: Wish) {
        // The thread ends after us.
        let _ = self.wishes.send(wish);
    }

    pub(crate) fn create(&self, op: OpId, (chunk, frame_bytes, frames): (ChunkId, ByteCount, u32)) {
        self.wish(Wish::Create { op, chunk, frame_bytes, frames });
    }

    pub(crate) fn drop_chunk(&self, op: OpId, chunk: ChunkId) {
        self.wish(Wish::Drop { op, chunk });
    }

    /// A frame's payload, read out. Waits for what the thread that makes chunks does before.
    pub(crate) fn snapshot(&self, frame: FrameRef, length: ByteCount) -> Option<Snapshot> {
        let (answer, answered) = channel();
        self.wish(Wish::Read { frame, length, answer });
        let late = || Some(Err(DeviceError::Late(SNAPSHOT_WITHIN)));
        answered.recv_timeout(SNAPSHOT_WITHIN).unwrap_or_else(|_| late())
    }

    pub(crate) fn register(&self, memory: HostBytes) {
        self.wish(Wish::Register(memory));
    }

    pub(crate) fn forget(&self, memory: HostBytes, last: Arc<Last>) {
        self.wish(Wish::Forget(memory, last));
    }

    pub(crate) fn answer(&self, op: OpId, outcome: Result<Done, Fault>) {
        self.landing.check(Check::Answer(op, outcome));
    }

    pub(crate) fn verify(&self, op: OpId, place: Place, expect: BlockHeader) {
        self.landing.check(Check::Verify { op, place, expect });
    }

    /// Starts a copy with an end here.
    pub(crate) fn transfer(&self, transfer: Transfer) {
        start(&self.copies, &self.landing, transfer.clone(), Next::Compare(transfer));
    }

    /// Copies to host memory and from there to a device that does not reach this one.
    pub(crate) fn send_through_host(&self, transfer: Transfer, to: &Self) {
        let between = HostBytes::anonymous(transfer.expect.length);
        let between = match between {
            Ok(between) => Place::Between(between),
            Err(error) => {
                tracing::warn!(%error, "no memory for a copy between two devices");
                return self.answer(transfer.op, Err(Fault::Device));
            }
        };
        let first = Transfer { target: between.clone(), ..transfer.clone() };
        let second = Transfer { source: between, ..transfer };
        let (copies, landing) = (Arc::clone(&to.copies), Arc::clone(&to.landing));
        let next = move |result: Result<(), DeviceError>| match result {
            Ok(()) => start(&copies, &landing, second.clone(), Next::Compare(second)),
            Err(error) => landing.check(Check::Landed(Next::Compare(second), Err(error))),
        };
        start(&self.copies, &self.landing, first, Next::Onwards(Box::new(next)));
    }
}

impl Drop for Gpu {
    /// Lets what waits come to its end. A driver that hangs keeps its threads.
    fn drop(&mut self) {
        self.wish(Wish::Stop);
        self.landing.check(Check::Stop);
        // Nothing is sent; it is over when the other end goes.
        let ended = self.ended.get_mut().unwrap_or_else(PoisonError::into_inner);
        let _: Result<(), _> = ended.recv_timeout(END_WITHIN);
    }
}

fn start(copies: &Copies, landing: &Landing, transfer: Transfer, next: Next) {
    let class = match transfer.target.gpu() {
        Some(_) => IoClass::PrefillFetch,
        None => IoClass::Demotion,
    };
    let id = landing.begin(next);
    let expect = &transfer.expect;
    let piece = transfer
        .source
        .span(expect)
        .and_then(|source| Ok((source, transfer.target.span(expect)?)))
        .and_then(|(source, target)| Piece::new(source, target));
    let submitted = piece.and_then(|piece| {
        let job = Job { id, class, pieces: vec![piece], within: COPY_WITHIN };
        copies.submit(job).map_err(|refused| refused.error)
    });
    if let Err(error) = submitted {
        landing.refused(id, error);
    }
}

pub(super) fn spawn(name: String, run: impl FnOnce() + Send + 'static) -> Result<(), DeviceError> {
    std::thread::Builder::new()
        .name(name)
        .spawn(run)
        .map(drop)
        .map_err(|error| DeviceError::Driver { call: "thread", detail: error.to_string() })
}
