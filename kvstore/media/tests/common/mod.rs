//! A store in a temporary directory, driven one operation at a time.

#![allow(
    dead_code,
    unreachable_pub,
    clippy::unwrap_used,
    reason = "shared by test programs that each use another part"
)]

use std::path::PathBuf;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use terrace_core::{
    BlockHeader, BlockId, ByteCount, ChunkId, DeviceId, DiskFrame, Done, Fault, FrameRef, IoClass, OpId,
    SpaceId, TenantId, UseStats, Via, checksum,
};
use terrace_media::{
    Access, Backend, Complete, DeviceConfig, Hooks, Media, MediaConfig, MediaError, MediaOp, OpenReport,
    SpaceRecord,
};

pub const CHUNK_BYTES: u64 = 4 << 20;
pub const PATIENCE: Duration = Duration::from_secs(30);

/// A block long enough that its last page is not full.
pub const BLOCK_BYTES: u64 = 200_000;
pub const FRAME_BYTES: u64 = 4096 + 200_704;

pub fn folder() -> tempfile::TempDir {
    // The target directory is on a real file system; /tmp may be memory.
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

pub fn config(folder: &tempfile::TempDir, backend: Backend) -> MediaConfig {
    config_at(folder.path(), backend)
}

pub fn config_at(folder: &std::path::Path, backend: Backend) -> MediaConfig {
    MediaConfig {
        data_dir: folder.join("data"),
        node: [7; 16],
        chunk_bytes: ByteCount::new(CHUNK_BYTES),
        devices: vec![DeviceConfig { path: folder.join("nvme0.dat"), slots: 4 }],
        backend,
        bytes_in_flight_max: ByteCount::new(8 << 20),
        checkers: 2,
        hooks: Hooks::default(),
    }
}

pub fn device_path(folder: &tempfile::TempDir) -> PathBuf {
    folder.path().join("nvme0.dat")
}

pub struct Store {
    pub media: Media,
    pub report: OpenReport,
    answers: Receiver<(OpId, Result<Done, Fault>)>,
    next: u64,
}

impl Store {
    pub fn open(folder: &tempfile::TempDir, backend: Backend) -> Self {
        Self::with(config(folder, backend)).unwrap()
    }

    pub fn with(config: MediaConfig) -> Result<Self, MediaError> {
        let (sender, answers) = channel();
        let complete: Complete = Box::new(move |op, outcome| drop(sender.send((op, outcome))));
        let (media, report) = Media::open(config, complete)?;
        Ok(Self { media, report, answers, next: 0 })
    }

    pub fn op(&mut self) -> OpId {
        self.next += 1;
        OpId::new(self.next)
    }

    /// Starts an operation and waits for its answer, which must be the next one.
    pub fn run(&mut self, make: impl FnOnce(OpId) -> MediaOp) -> Result<Done, Fault> {
        let op = self.op();
        self.media.start(make(op));
        let (answered, outcome) = self.answer();
        assert_eq!(answered, op);
        outcome
    }

    pub fn answer(&self) -> (OpId, Result<Done, Fault>) {
        self.answers.recv_timeout(PATIENCE).expect("an operation was never answered")
    }

    pub fn chunk(&mut self, chunk: u64, access: Access) {
        let made = self.run(|op| MediaOp::CreateChunk {
            op,
            chunk: ChunkId::new(chunk),
            access,
            frame_bytes: ByteCount::new(FRAME_BYTES),
            frames: 8,
        });
        assert_eq!(made, Ok(Done::ChunkCreated));
    }

    pub fn fill(&self, frame: FrameRef, payload: &[u8]) {
        self.media.chunk(frame.chunk).unwrap().copy_in(frame.index, 0, payload).unwrap();
    }

    pub fn payload(&self, frame: FrameRef) -> Vec<u8> {
        let mut bytes = vec![0; usize::try_from(BLOCK_BYTES).unwrap()];
        self.media.chunk(frame.chunk).unwrap().copy_out(frame.index, 0, &mut bytes).unwrap();
        bytes
    }

    pub fn carve(&mut self, slot: u32) {
        let carved = self.run(|op| MediaOp::CarveSlot {
            op,
            device: DeviceId::new(0),
            slot,
            space: space(),
            frame_bytes: ByteCount::new(FRAME_BYTES),
        });
        assert_eq!(carved, Ok(Done::Plain));
    }

    pub fn write(
        &mut self,
        source: FrameRef,
        target: DiskFrame,
        header: BlockHeader,
        via: Via,
    ) -> Result<Done, Fault> {
        let target_offset = self.offset(target);
        let class = IoClass::Persistence;
        self.run(|op| MediaOp::Write { op, source, target, target_offset, header, via, class })
    }

    pub fn read(&mut self, source: DiskFrame, target: FrameRef, expect: BlockHeader) -> Result<Done, Fault> {
        let source_offset = self.offset(source);
        let class = IoClass::Fetch;
        self.run(|op| MediaOp::Read { op, source, source_offset, target, expect, class })
    }

    pub fn commit(
        &mut self,
        put: Vec<(DiskFrame, BlockHeader)>,
        delete: Vec<BlockId>,
    ) -> Result<Done, Fault> {
        self.run(|op| MediaOp::Commit { op, put: puts(put), delete })
    }

    /// Fills a frame, writes it and commits it.
    pub fn persist(&mut self, number: u8, target: DiskFrame) -> BlockHeader {
        let source = frame(1, 0);
        let bytes = payload(number);
        self.fill(source, &bytes);
        let header = header(number, &bytes);
        assert_eq!(self.write(source, target, header, Via::Direct), Ok(Done::Plain));
        assert_eq!(self.commit(vec![(target, header)], vec![]), Ok(Done::Plain));
        header
    }

    pub fn offset(&self, frame: DiskFrame) -> u64 {
        self.media.frame_offset(frame, ByteCount::new(FRAME_BYTES)).unwrap()
    }

    pub fn known(&self) -> Vec<BlockId> {
        let mut blocks = Vec::new();
        self.media
            .blocks(3, &mut |found| blocks.extend(found.iter().map(|found| found.header.block)))
            .unwrap();
        blocks.sort();
        blocks
    }
}

/// Blocks of whose past nothing is known.
pub fn puts(put: Vec<(DiskFrame, BlockHeader)>) -> Vec<(DiskFrame, BlockHeader, UseStats)> {
    put.into_iter().map(|(frame, header)| (frame, header, UseStats::default())).collect()
}

pub fn space() -> SpaceId {
    SpaceId::from_bytes([3; 16])
}

pub fn tenant() -> TenantId {
    TenantId::from_bytes([4; 16])
}

pub fn record() -> SpaceRecord {
    SpaceRecord {
        space: space(),
        tenant: tenant(),
        tenant_name: "default".to_owned(),
        generation: 1,
        manifest: b"any bytes of the daemon".to_vec(),
    }
}

pub fn block(number: u8) -> BlockId {
    BlockId::from_bytes([number; 16])
}

pub fn frame(chunk: u64, index: u32) -> FrameRef {
    FrameRef { chunk: ChunkId::new(chunk), index }
}

pub fn disk(slot: u32, index: u32) -> DiskFrame {
    DiskFrame { device: DeviceId::new(0), slot, index }
}

pub fn payload(number: u8) -> Vec<u8> {
    (0..BLOCK_BYTES).map(|at| number.wrapping_add((at % 251).to_le_bytes()[0])).collect()
}

pub fn header(number: u8, payload: &[u8]) -> BlockHeader {
    BlockHeader {
        block: block(number),
        space: space(),
        tenant: tenant(),
        parent: (number > 1).then(|| block(number - 1)),
        length: ByteCount::new(payload.len() as u64),
        checksum: checksum(block(number), 1, payload),
        generation: 1,
        write_sequence: u64::from(number),
    }
}

/// Both ways of doing I/O.
pub const BACKENDS: [Backend; 2] = [Backend::IoUring, Backend::Pread];
