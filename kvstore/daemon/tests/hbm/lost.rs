//! A device of a daemon in this process, which fails when it is told to.

use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::{HOST_ONLY, all_on, all_pinned, assert_exact, places};
use crate::common::lane::Lane;
use crate::common::{PATIENCE, folder, keys, socket};
use terrace_client::wire::{GrantOutcome, LeaseKind};
use terrace_core::{ByteCount, Core, GpuView};
use terrace_gpudirect::{Device, Fault, HostOnly};
use terrace_media::Hooks;
use terraced::{Config, Daemon};

/// A daemon with one device, and the device.
async fn start(folder: &Path, extra: &str) -> (Daemon, Arc<HostOnly>) {
    let path = crate::common::config(folder, &format!("{extra}{HOST_ONLY}"));
    let made: Arc<Mutex<Option<Arc<HostOnly>>>> = Arc::default();
    let given = made.clone();
    let open = move |device: &terraced::HbmDevice| {
        let device = Arc::new(HostOnly::new(0, ByteCount::new(device.bytes.get()))?);
        *given.lock().unwrap() = Some(device.clone());
        Ok(device as Arc<dyn Device>)
    };
    let daemon =
        Daemon::start_on(Config::read(&path).unwrap(), Hooks::default(), Arc::new(open)).await.unwrap();
    let device = made.lock().unwrap().take().unwrap();
    (daemon, device)
}

/// Another session has read the blocks in Pinned: their bytes were compared, and are granted at once from then on.
pub(super) async fn compared(folder: &Path, names: &[[u8; 4]]) {
    let mut other = Lane::open(&socket(folder)).await;
    assert!(all_pinned(&other.lease(LeaseKind::Read, names).await));
}

fn view(daemon: &Daemon) -> GpuView {
    daemon.engine().view(|core: &Core| core.tier_views().hbm[0])
}

async fn until(daemon: &Daemon, what: &str, holds: impl Fn(&GpuView) -> bool) {
    let began = std::time::Instant::now();
    while !holds(&view(daemon)) {
        assert!(began.elapsed() < PATIENCE, "{what} does not come: {:?}", view(daemon));
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Copies that fail, or are refused at their start, half written: the block is granted where it was, with its bytes, and
/// comes to the device when that works again.
#[tokio::test(flavor = "multi_thread")]
async fn failed_copies_leave_the_block_where_it_was() {
    let folder = folder();
    let (daemon, device) = start(folder.path(), "persist_delay_ms = 3600000\n").await;
    let names = keys(3);
    let mut pinned = Lane::open(&socket(folder.path())).await;
    let (_window, _) = pinned.write(&names).await;
    let mut lane = Lane::on_device(folder.path(), 0).await;
    for fault in [Fault::FailedCopy, Fault::RefusedStart, Fault::FailedCopy] {
        for _ in &names {
            device.inject(fault);
        }
        let read = lane.lease(LeaseKind::Read, &names).await;
        assert!(all_pinned(&read), "{fault:?}: {:?}", places(&read));
        assert_exact(&mut lane, &read, &names).await;
        lane.release(read.lease).await;
    }
    assert!(view(&daemon).faults >= 9, "{:?}", view(&daemon));
    let read = lane.lease(LeaseKind::Read, &names).await;
    assert!(all_on(&read, 0), "{:?}", places(&read));
    assert_exact(&mut lane, &read, &names).await;
    drop((lane, pinned));
    daemon.engine().view(Core::check);
    daemon.stop().await;
}

/// Blocks that only the device holds are lost with it. They must be misses, not errors and not other bytes, and the
/// frames of copies that never ended must stay nobody's.
#[tokio::test(flavor = "multi_thread")]
async fn a_lost_device_takes_its_blocks_alone() {
    let folder = folder();
    let (daemon, device) = start(folder.path(), "persist_delay_ms = 3600000\n").await;
    let (there, below) = (keys(4), [[4, 4, 4, 4], [5, 5, 5, 5]]);
    let mut lane = Lane::on_device(folder.path(), 0).await;
    let (window, written) = lane.write(&there).await;
    assert!(all_on(&written, 0));
    let mut pinned = Lane::open(&socket(folder.path())).await;
    let (_window, _) = pinned.write(&below).await;
    compared(folder.path(), &below).await;
    // A copy is on its way when the device goes, and never ends.
    device.inject(Fault::Hold);
    let read = lane.lease_within(LeaseKind::Read, &below, 50).await;
    assert!(all_pinned(&read), "{:?}", places(&read));
    device.inject(Fault::LoseAndHang);
    until(&daemon, "the loss", |found| !found.usable).await;
    let read = lane.lease_within(LeaseKind::Read, &there, 100).await;
    assert!(read.blocks.iter().all(|grant| grant.outcome() == GrantOutcome::Missing), "{read:?}");
    for (grant, key) in written.blocks.iter().zip(&there) {
        let fence = window.fence(grant.frame).map(terrace_core::Fence::get);
        assert!(fence > Some(grant.fence), "{key:?}: its fence did not move");
    }
    let read = lane.lease(LeaseKind::Read, &below).await;
    assert!(all_pinned(&read), "{:?}", places(&read));
    assert_exact(&mut lane, &read, &below).await;
    daemon.engine().view(Core::check);
    device.inject(Fault::LetGo);
    until(&daemon, "the end of its copies", |found| found.running == 0).await;
    drop((lane, pinned, window));
    daemon.engine().view(Core::check);
    daemon.stop().await;
}

/// A copy that comes long after its wait: who waited has the block from host memory, and the late copy is either the
/// block, or nobody's.
#[tokio::test(flavor = "multi_thread")]
async fn a_late_copy_is_the_block_or_nothing() {
    let folder = folder();
    let (daemon, device) = start(folder.path(), "persist_delay_ms = 3600000\n").await;
    let names = keys(4);
    let mut pinned = Lane::open(&socket(folder.path())).await;
    let (_window, _) = pinned.write(&names).await;
    compared(folder.path(), &names).await;
    device.inject(Fault::Hold);
    let mut lane = Lane::on_device(folder.path(), 0).await;
    let read = lane.lease_within(LeaseKind::Read, &names, 100).await;
    assert!(all_pinned(&read), "{:?}", places(&read));
    assert_eq!(view(&daemon).running, 4);
    lane.release(read.lease).await;
    device.inject(Fault::LetGo);
    until(&daemon, "the late copies", |found| found.running == 0 && found.memory.frames.sealed == 4).await;
    let read = lane.lease(LeaseKind::Read, &names).await;
    assert!(all_on(&read, 0), "{:?}", places(&read));
    assert_exact(&mut lane, &read, &names).await;
    drop((lane, pinned));
    daemon.engine().view(Core::check);
    daemon.stop().await;
}
