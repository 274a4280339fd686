//! Host memory chunks: one memfd of data and one of fences each.
//!
//! The daemon maps both read-write. A chunk of the pool is sealed against new
//! writable mappings before any descriptor of it can leave; a window is sealed
//! when it is adopted. Descriptors that leave are opened anew, read-only for
//! readers, so that the kernel counts them apart from ours: [`ChunkMemory::holders`]
//! and [`Retired::gone`] prove by a file lease that no other process holds the
//! memory any more. The bytes are shared with other processes, so they are
//! reached by raw pointers and copies, never by references that leave this file.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use terrace_core::{BlockHeader, ByteCount, Checksum, Checksummer, Fence, MIB};
use terrace_gpudirect::HostBytes;
use terrace_lane::fold;

use crate::fences::FencePages;
use crate::header::FRAME_HEADER_BYTES;
use crate::memfd::{Blank, Mapping, holders, probe, reopen, seal};

/// Size and alignment of a header page, and of everything that O_DIRECT touches.
pub const PAGE_BYTES: u64 = 4096;
pub(crate) const HUGE_PAGE_BYTES: u64 = 2 * MIB;

static NEXT_ID: AtomicU64 = AtomicU64::new(1);

/// Who may write a chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// The daemon alone.
    Pool,
    /// One client, until the window is adopted.
    Window,
}

/// What kind of pages a chunk got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageKind {
    /// Reserved 2 MiB pages (`nr_hugepages`).
    Reserved,
    /// 2 MiB pages by `MADV_HUGEPAGE` (`shmem_enabled`), where the kernel found some.
    Transparent,
    /// 4 KiB pages.
    Small,
}

impl PageKind {
    /// For `info`.
    pub const fn label(self) -> &'static str {
        match self {
            Self::Reserved => "2 MiB huge pages (reserved)",
            Self::Transparent => "2 MiB huge pages (transparent)",
            Self::Small => "4 KiB pages",
        }
    }
}

/// Other processes that hold a chunk, by descriptor or mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Holders {
    /// Nobody: the kernel proved it.
    Nobody,
    /// Readers only.
    Readers,
    /// Somebody can write.
    Writers,
    /// The kernel cannot tell (no /proc): assume the worst.
    Unknown,
}

/// A piece of a frame that lies outside of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "bytes {offset}..+{bytes} of frame {index} are outside: the chunk has {frames} frames of {payload} payload bytes"
)]
pub struct OutsideFrame {
    /// Frame that was named.
    pub index: u32,
    /// First byte of the payload that was named.
    pub offset: u64,
    /// Length that was named.
    pub bytes: u64,
    /// Frames of the chunk.
    pub frames: u32,
    /// Payload bytes of a frame.
    pub payload: u64,
}

/// A chunk's memory. Dropped: unmapped and closed.
#[derive(Debug)]
pub struct ChunkMemory {
    id: u64,
    /// The memfd's first open file. Never leaves, so a lease on `probe` sees only foreign ones.
    data: OwnedFd,
    /// Read-only opening of the same memory, for leases; absent without /proc.
    probe: Option<OwnedFd>,
    mapping: Mapping,
    fences: FencePages,
    frame_bytes: u64,
    frames: u32,
    pages: PageKind,
    sealed: AtomicBool,
    /// A descriptor was handed out that leases cannot tell from ours.
    shared_blindly: AtomicBool,
}

impl ChunkMemory {
    /// Makes, populates, maps and (for [`Access::Pool`]) seals a chunk of at
    /// least `frames * frame_bytes`, rounded up to 2 MiB. Blocks for tens of
    /// milliseconds. All fences are 1.
    ///
    /// # Errors
    /// `OutOfMemory` if the machine would keep less than 256 MiB available;
    /// `InvalidInput` for frames that are not whole pages; else what the kernel said.
    pub fn create(frame_bytes: ByteCount, frames: u32, access: Access) -> io::Result<Self> {
        Self::on(Blank::make(Self::bytes_for(frame_bytes, frames)?)?, frame_bytes, frames, access)
    }

    /// Memory of a chunk of so many frames, fences apart.
    ///
    /// # Errors
    /// `InvalidInput`, as for [`Self::create`].
    pub(crate) fn bytes_for(frame_bytes: ByteCount, frames: u32) -> io::Result<u64> {
        let frame_bytes = frame_bytes.get();
        if frames == 0 || frame_bytes <= PAGE_BYTES || !frame_bytes.is_multiple_of(PAGE_BYTES) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "a chunk has at least one frame of a header page and whole payload pages",
            ));
        }
        u64::from(frames)
            .checked_mul(frame_bytes)
            .and_then(|bytes| bytes.checked_next_multiple_of(HUGE_PAGE_BYTES))
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "the chunk's size overflows"))
    }

    /// As [`Self::create`], on memory of at least [`Self::bytes_for`] these frames that was made before.
    pub(crate) fn on(blank: Blank, frame_bytes: ByteCount, frames: u32, access: Access) -> io::Result<Self> {
        let frame_bytes = frame_bytes.get();
        let Blank { data, mapping, pages } = blank;
        assert!(u64::from(frames) * frame_bytes <= mapping.bytes, "a chunk's memory holds its frames");
        let probe = probe(&data);
        let fences = FencePages::create(frames)?;
        let chunk = Self {
            id: NEXT_ID.fetch_add(1, Ordering::Relaxed),
            data,
            probe,
            mapping,
            fences,
            frame_bytes,
            frames,
            pages,
            sealed: AtomicBool::new(false),
            shared_blindly: AtomicBool::new(false),
        };
        seal(chunk.data.as_fd(), libc::F_SEAL_SHRINK | libc::F_SEAL_GROW)?;
        if access == Access::Pool {
            chunk.adopt()?;
        }
        Ok(chunk)
    }

    /// Forbids new writable mappings for ever. Mappings that exist stay as they are.
    ///
    /// # Errors
    /// What the kernel said; the chunk is as before.
    pub fn adopt(&self) -> io::Result<()> {
        seal(self.data.as_fd(), libc::F_SEAL_FUTURE_WRITE)?;
        self.sealed.store(true, Ordering::Release);
        Ok(())
    }

    /// A new read-only descriptor of the data, to be sent to a reader.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn share_data(&self) -> io::Result<OwnedFd> {
        self.share(libc::O_RDONLY)
    }

    /// A new writable descriptor of a window that is not adopted yet, for its owner.
    ///
    /// # Errors
    /// `PermissionDenied` for a chunk of the pool; else what the kernel said.
    pub fn share_writable(&self) -> io::Result<OwnedFd> {
        if self.sealed.load(Ordering::Acquire) {
            return Err(io::Error::new(
                io::ErrorKind::PermissionDenied,
                "the chunk is sealed; lease a new window",
            ));
        }
        self.share(libc::O_RDWR)
    }

    /// A new read-only descriptor of the fence pages.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn share_fences(&self) -> io::Result<OwnedFd> {
        self.fences.share()
    }

    fn share(&self, flags: libc::c_int) -> io::Result<OwnedFd> {
        if self.probe.is_none() {
            self.shared_blindly.store(true, Ordering::Release);
        }
        match reopen(self.data.as_fd(), flags) {
            Ok(fd) => Ok(fd),
            // The seals protect a chunk of the pool all the same, but leases can no longer tell who holds it.
            Err(_) => {
                self.shared_blindly.store(true, Ordering::Release);
                self.data.try_clone()
            }
        }
    }

    /// Who else holds this memory now.
    pub fn holders(&self) -> Holders {
        holders(self.probe.as_ref(), self.shared_blindly.load(Ordering::Acquire))
    }

    /// Number of this memory, unique in this process.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// Frames of the chunk.
    pub fn frames(&self) -> u32 {
        self.frames
    }

    /// Header page and payload of one frame.
    pub fn frame_bytes(&self) -> ByteCount {
        ByteCount::new(self.frame_bytes)
    }

    /// Memory of the chunk, fences apart.
    pub fn bytes(&self) -> ByteCount {
        ByteCount::new(self.mapping.bytes)
    }

    /// The pages it got.
    pub fn pages(&self) -> PageKind {
        self.pages
    }

    /// Stores a fence, as [`FencePages::set`] does.
    ///
    /// # Panics
    /// If the chunk has no such frame: the core names frames of chunks that it made.
    pub fn set_fence(&self, index: u32, fence: Fence) {
        self.fences.set(index, fence);
    }

    /// Loads a fence, acquire order.
    ///
    /// # Panics
    /// If the chunk has no such frame.
    pub fn fence(&self, index: u32) -> Fence {
        self.fences.fence(index)
    }

    /// Its payloads, for a device that copies to and from them. Keeps the memory: a chunk whose bytes somebody
    /// keeps is not given back.
    ///
    /// # Panics
    /// Never: what is mapped fits the address space.
    pub fn host_bytes(self: &Arc<Self>) -> HostBytes {
        let length = usize::try_from(self.mapping.bytes).expect("what is mapped fits the address space");
        // SAFETY: the mapping is readable and writable, lives as long as self, which is the owner, and is of memory
        // that is sealed against shrinking. Nobody makes references to its bytes.
        unsafe { HostBytes::from_raw(Arc::clone(self) as _, self.mapping.base, length) }
    }

    /// Copies into a payload.
    ///
    /// # Errors
    /// If the bytes do not fit.
    pub fn copy_in(&self, index: u32, offset: u64, bytes: &[u8]) -> Result<(), OutsideFrame> {
        let target = self.payload(index, offset, bytes.len() as u64)?;
        // SAFETY: `payload` checked that the range is inside the mapping; `bytes` is a Rust slice and so lies outside
        // of it. The caller owns the frame (Filling), so nobody else writes it.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), target, bytes.len()) };
        Ok(())
    }

    /// Copies out of a payload. What another process may still write is copied
    /// as it happens to be: check the fence or the checksum of the copy afterwards.
    ///
    /// # Errors
    /// If the range is outside.
    pub fn copy_out(&self, index: u32, offset: u64, target: &mut [u8]) -> Result<(), OutsideFrame> {
        let source = self.payload(index, offset, target.len() as u64)?;
        // SAFETY: as in `copy_in`, the other way round.
        unsafe { std::ptr::copy_nonoverlapping(source, target.as_mut_ptr(), target.len()) };
        Ok(())
    }

    /// Copies a payload from a frame of any chunk into this one's, which the caller owns (Filling), and says
    /// whether what was copied has the checksum. Every byte of the source is read once: what another process
    /// stores there meanwhile is in the copy and in its checksum, or in neither.
    pub(crate) fn copy_from(
        &self,
        index: u32,
        from: &Self,
        from_index: u32,
        expect: &BlockHeader,
    ) -> Result<bool, OutsideFrame> {
        let source = from.payload(from_index, 0, expect.length.get())?;
        let target = self.payload(index, 0, expect.length.get())?;
        let length = usize::try_from(expect.length.get()).map_err(|_| self.outside(index, 0, u64::MAX))?;
        let mut summer = Checksummer::new(expect.block, expect.length, expect.generation);
        // SAFETY: `payload` checked both ranges; they are of two frames, and the target's is the caller's alone.
        unsafe { fold::copy_and_sum(source, target, length, &mut summer) };
        Ok(summer.finish() == expect.checksum)
    }

    /// Stores a header page in front of a payload of this length, and zeros behind it up to the page's end.
    pub(crate) fn fill_header(
        &self,
        index: u32,
        page: &[u8; 4096],
        length: ByteCount,
    ) -> Result<(), OutsideFrame> {
        let used = length.get();
        let rest = used.next_multiple_of(PAGE_BYTES) - used;
        let behind = self.payload(index, used, rest)?;
        let header = self.frame(index)?;
        // SAFETY: both ranges are inside the frame, outside of the payload's `length` bytes that readers look at.
        unsafe {
            std::ptr::copy_nonoverlapping(page.as_ptr(), header, page.len());
            // At most 4095 bytes.
            std::ptr::write_bytes(behind, 0, usize::try_from(rest).unwrap_or(0));
        }
        Ok(())
    }

    /// Whether a frame's header page holds these bytes, and zeros behind them.
    pub(crate) fn header_is(
        &self,
        index: u32,
        bytes: &[u8; FRAME_HEADER_BYTES],
    ) -> Result<bool, OutsideFrame> {
        const REST: [u8; 4096 - FRAME_HEADER_BYTES] = [0; 4096 - FRAME_HEADER_BYTES];
        let header = self.frame(index)?;
        // SAFETY: the page is inside the frame, and the range inside the page. A comparison by address makes no reference to
        // memory that others may write.
        let named = unsafe { libc::memcmp(header.cast(), bytes.as_ptr().cast(), bytes.len()) };
        // SAFETY: as before, for the rest of the page.
        let rest = unsafe { libc::memcmp(header.add(bytes.len()).cast(), REST.as_ptr().cast(), REST.len()) };
        Ok(named == 0 && rest == 0)
    }

    /// Copies a frame's header page out.
    pub(crate) fn copy_header(&self, index: u32, page: &mut [u8; 4096]) -> Result<(), OutsideFrame> {
        let header = self.frame(index)?;
        // SAFETY: the header page is inside the frame.
        unsafe { std::ptr::copy_nonoverlapping(header, page.as_mut_ptr(), page.len()) };
        Ok(())
    }

    /// Checksum of a payload as it is now.
    ///
    /// # Errors
    /// If `expect.length` does not fit a frame.
    pub fn checksum(&self, index: u32, expect: &BlockHeader) -> Result<Checksum, OutsideFrame> {
        let source = self.payload(index, 0, expect.length.get())?;
        let mut summer = Checksummer::new(expect.block, expect.length, expect.generation);
        let length = usize::try_from(expect.length.get()).map_err(|_| self.outside(index, 0, u64::MAX))?;
        // SAFETY: `payload` checked the range. Each byte is loaded once, whoever may be writing it.
        unsafe { fold::sum(source, length, &mut summer) };
        Ok(summer.finish())
    }

    /// Does a payload have the checksum that its header says?
    ///
    /// # Errors
    /// If `expect.length` does not fit a frame.
    pub fn verify(&self, index: u32, expect: &BlockHeader) -> Result<bool, OutsideFrame> {
        Ok(self.checksum(index, expect)? == expect.checksum)
    }

    /// Address of a frame's header page.
    pub(crate) fn frame(&self, index: u32) -> Result<*mut u8, OutsideFrame> {
        self.payload(index, 0, 0)?;
        let start =
            usize::try_from(u64::from(index) * self.frame_bytes).map_err(|_| self.outside(index, 0, 0))?;
        // SAFETY: index < frames, and the mapping holds all frames.
        Ok(unsafe { self.mapping.base.as_ptr().add(start) })
    }

    /// Address of a byte of a payload of which `bytes` bytes may be used. The
    /// pointer is good while this chunk lives.
    ///
    /// # Errors
    /// If the range is outside the frame's payload.
    pub fn payload(&self, index: u32, offset: u64, bytes: u64) -> Result<*mut u8, OutsideFrame> {
        let room = self.frame_bytes - PAGE_BYTES;
        let fits = offset.checked_add(bytes).is_some_and(|end| end <= room);
        if index >= self.frames || !fits {
            return Err(self.outside(index, offset, bytes));
        }
        let start = usize::try_from(u64::from(index) * self.frame_bytes + PAGE_BYTES + offset)
            .map_err(|_| self.outside(index, offset, bytes))?;
        // SAFETY: the range is inside frame `index`, which is inside the mapping.
        Ok(unsafe { self.mapping.base.as_ptr().add(start) })
    }

    /// The whole mapping, for registration with a ring.
    pub(crate) fn mapping(&self) -> (*mut u8, u64) {
        (self.mapping.base.as_ptr(), self.mapping.bytes)
    }

    fn outside(&self, index: u32, offset: u64, bytes: u64) -> OutsideFrame {
        OutsideFrame { index, offset, bytes, frames: self.frames, payload: self.frame_bytes - PAGE_BYTES }
    }

    /// Unmaps and closes; what is left tells when nobody else holds the memory.
    pub fn retire(self) -> Retired {
        let Self { data, probe, mapping, fences, shared_blindly, .. } = self;
        let bytes = ByteCount::new(mapping.bytes);
        drop((mapping, fences, data));
        Retired { probe, blind: shared_blindly.into_inner(), bytes }
    }
}

/// Memory that this process has unmapped.
#[derive(Debug)]
pub struct Retired {
    probe: Option<OwnedFd>,
    blind: bool,
    bytes: ByteCount,
}

impl Retired {
    /// True when no other process holds the memory, so that dropping this gives
    /// the pages back to the kernel. Never true if that cannot be proved for
    /// memory whose own descriptor was handed out.
    pub fn gone(&self) -> bool {
        match self.probe {
            Some(_) => holders(self.probe.as_ref(), self.blind) == Holders::Nobody,
            None => !self.blind,
        }
    }

    /// False if the kernel cannot tell whether other processes hold the memory.
    pub fn provable(&self) -> bool {
        !self.blind
    }

    /// Memory concerned.
    pub fn bytes(&self) -> ByteCount {
        self.bytes
    }
}
