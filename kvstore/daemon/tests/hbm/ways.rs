//! Each way that a block takes to a device and from it.

use std::time::Duration;

use super::{FRAMES, HOST_ONLY, all_on, all_pinned, assert_exact, assert_no_leak, device, places, until};
use crate::common::lane::{Lane, exact_or_missing, map};
use crate::common::{Running, folder, keys, socket};
use terrace_client::wire::{
    self, LeaseKind, SealOutcome, Tier, lane_request::Op, lane_response::Result as Answer,
};
use terrace_lane::Access;

/// A reader on the same device could get a copy in host memory, or bytes that moved for it: it must get the very frame
/// that the writer filled, and the device must have copied nothing.
#[tokio::test(flavor = "multi_thread")]
async fn another_session_reads_in_place() {
    let folder = folder();
    let daemon = Running::start(folder.path(), &format!("persist_delay_ms = 3600000\n{HOST_ONLY}"));
    let names = keys(8);
    let mut writer = Lane::on_device(folder.path(), 0).await;
    let (window, written) = writer.write(&names).await;
    assert!(all_on(&written, 0), "{written:?}");
    let mut reader = Lane::on_device(folder.path(), 0).await;
    let read = reader.lease(LeaseKind::Read, &names).await;
    assert!(all_on(&read, 0), "{read:?}");
    let place = |leased: &wire::LeaseResponse| -> Vec<(u64, u32)> {
        leased.blocks.iter().map(|grant| (grant.chunk, grant.frame)).collect()
    };
    assert_eq!(place(&written), place(&read), "the frames are not the writer's");
    assert_exact(&mut reader, &read, &names).await;
    let found = device(&daemon, 0).await;
    assert_eq!(found.activity.unwrap().copied_bytes_total, 0, "bytes moved for a lease");
    assert_eq!((found.on, found.device.as_str()), (true, "host-only:0"));
    let hbm = found.hbm.unwrap();
    assert_eq!((hbm.kind.as_str(), hbm.uuid.len(), hbm.bytes), ("host-only", 16, 16 << 20));
    drop(window);
    drop((writer, reader));
    // Sessions that map nothing of others get the same bytes by a copy in host memory.
    assert_eq!(exact_or_missing(&daemon, &names).await, 2 * names.len());
    assert_no_leak(&daemon).await;
}

/// What a client says of its bytes on a device may be wrong: the first reader must get a miss, and the writer be told.
#[tokio::test(flavor = "multi_thread")]
async fn a_false_seal_on_a_device_is_a_miss() {
    let folder = folder();
    let daemon = Running::start(folder.path(), &format!("persist_delay_ms = 3600000\n{HOST_ONLY}"));
    let names = keys(2);
    let mut writer = Lane::on_device(folder.path(), 0).await;
    let leased = writer.lease(LeaseKind::Write, &names).await;
    assert!(all_on(&leased, 0));
    // Nothing was stored: what lies there is not what is sealed.
    assert_eq!(writer.seal(&leased, &names).await, vec![SealOutcome::Sealed; 2]);
    let mut reader = Lane::on_device(folder.path(), 0).await;
    let read = reader.lease_within(LeaseKind::Read, &names, 2000).await;
    let missing = |grant: &wire::BlockGrant| grant.outcome() == wire::GrantOutcome::Missing;
    assert!(read.blocks.iter().all(missing), "{read:?}");
    assert_eq!(exact_or_missing(&daemon, &names).await, 0);
    drop((writer, reader));
    assert_no_leak(&daemon).await;
}

/// A block goes from the device to Pinned and Nvme by itself, survives a kill there, and comes back to the device when
/// a lease wants it there: each copy on the way could damage it.
#[tokio::test(flavor = "multi_thread")]
async fn blocks_survive_a_kill_and_come_back() {
    let folder = folder();
    let names = keys(20);
    let daemon = Running::start(folder.path(), &format!("admission = \"all\"\n{HOST_ONLY}"));
    let mut writer = Lane::on_device(folder.path(), 0).await;
    for part in names.chunks(5) {
        let (_window, written) = writer.write(part).await;
        assert!(all_on(&written, 0), "{written:?}");
        writer.release(written.lease).await;
    }
    daemon.persisted().await;
    let moved = device(&daemon, 0).await.activity.unwrap().copied_bytes_total;
    assert!(moved >= 20 * (256 << 10), "{moved} bytes came out of the device");
    daemon.kill();
    let daemon = Running::start(folder.path(), HOST_ONLY);
    let mut reader = Lane::on_device(folder.path(), 0).await;
    let read = reader.lease(LeaseKind::Read, &names).await;
    assert!(all_on(&read, 0), "{:?}", places(&read));
    assert_exact(&mut reader, &read, &names).await;
    drop((writer, reader));
    assert_no_leak(&daemon).await;
}

/// More blocks than the device holds: the oldest go to slower tiers, none is wrong, none is lost.
#[tokio::test(flavor = "multi_thread")]
async fn a_full_device_gives_its_oldest_blocks_away() {
    let folder = folder();
    let extra =
        "window_idle_ms = 50\nadmission = \"all\"\n[[hbm]]\ndevice = \"host-only\"\nbytes = \"8MiB\"\n";
    let daemon = Running::start(folder.path(), extra);
    let names = keys(4 * FRAMES);
    let mut writer = Lane::on_device(folder.path(), 0).await;
    for part in names.chunks(5) {
        let (_window, written) = writer.write(part).await;
        writer.release(written.lease).await;
        for chunk in written.blocks.iter().map(|grant| grant.chunk) {
            // A full device writes in Pinned; a window that still has room is not taken back.
            let _ = writer.ask(Op::ReturnWindow(wire::ReturnWindow { chunk })).await;
        }
    }
    assert_eq!(exact_or_missing(&daemon, &names).await, 2 * names.len());
    let found = device(&daemon, 0).await;
    assert!(found.populated_bytes <= 8 << 20, "{found:?}");
    drop(writer);
    assert_no_leak(&daemon).await;
}

/// The engine beside the device needs memory: it must get it within its time, and every block must still be there.
#[tokio::test(flavor = "multi_thread")]
async fn shrink_gives_memory_back_and_keeps_blocks() {
    let folder = folder();
    let extra = "persist_delay_ms = 3600000\npinned_bytes = \"64MiB\"\nwindow_recall_max_ms = 100\nwindow_idle_ms = 50\n";
    let daemon = Running::start(folder.path(), &format!("{extra}{HOST_ONLY}"));
    let names = keys(3 * FRAMES);
    let mut writer = Lane::on_device(folder.path(), 0).await;
    for part in names.chunks(15) {
        let (window, written) = writer.write(part).await;
        assert!(all_on(&written, 0), "{written:?}");
        writer.release(written.lease).await;
        drop(window);
        writer.ask(Op::ReturnWindow(wire::ReturnWindow { chunk: written.blocks[0].chunk })).await.unwrap();
    }
    let mut engine = Lane::open(&socket(folder.path())).await;
    let shrink = wire::Shrink { device: 0, bytes: 12 << 20, wait_ms: 20_000 };
    let (Answer::Shrunk(shrunk), _) = engine.ask(Op::Shrink(shrink)).await.unwrap() else { panic!() };
    assert!(shrunk.free_bytes >= 12 << 20, "{shrunk:?}");
    let found = until(&daemon, "memory given back", |found| found.activity.unwrap().device_chunks <= 1).await;
    assert!(found.given_back_bytes >= 12 << 20, "{found:?}");
    assert_eq!(exact_or_missing(&daemon, &names).await, 2 * names.len(), "a block was lost by the shrink");
    // What one engine asked for ends with it.
    drop(engine);
    until(&daemon, "the engine's memory", |found| found.given_back_bytes == 0).await;
    drop(writer);
    assert_no_leak(&daemon).await;
}

/// A block of one device is wanted on another: it must come there, from the device that has it, and be the same.
#[tokio::test(flavor = "multi_thread")]
async fn blocks_go_from_device_to_device() {
    let folder = folder();
    let two = "[[hbm]]\ndevice = \"host-only:0\"\nbytes = \"8MiB\"\n[[hbm]]\ndevice = \"host-only:1\"\nbytes = \"8MiB\"\n";
    let daemon = Running::start(folder.path(), &format!("persist_delay_ms = 3600000\n{two}"));
    let names = keys(6);
    let mut first = Lane::on_device(folder.path(), 0).await;
    let (_window, written) = first.write(&names).await;
    assert!(all_on(&written, 0));
    first.release(written.lease).await;
    let mut second = Lane::on_device(folder.path(), 1).await;
    let read = second.lease(LeaseKind::Read, &names).await;
    assert!(all_on(&read, 1), "{:?}", places(&read));
    assert_exact(&mut second, &read, &names).await;
    let (one, other) = (device(&daemon, 0).await, device(&daemon, 1).await);
    assert_ne!(one.hbm.unwrap().uuid, other.hbm.unwrap().uuid);
    assert_eq!(other.activity.unwrap().copied_bytes_total, 6 * (256 << 10), "it came by another way");
    drop((first, second));
    assert_no_leak(&daemon).await;
}

/// Device memory cannot be write-protected. A session that must not write what others read is never given a chunk of
/// it, whatever it asks for.
#[tokio::test(flavor = "multi_thread")]
async fn isolated_sessions_get_host_memory() {
    let folder = folder();
    let tables = format!("{HOST_ONLY}[[tenant]]\nname = \"default\"\nwindows = \"isolated\"\n");
    let daemon = Running::start(folder.path(), &tables);
    let mut lane = Lane::on_device(folder.path(), 0).await;
    let names = keys(3);
    let (_window, written) = lane.write(&names).await;
    let read = lane.lease(LeaseKind::Read, &names).await;
    assert!(all_pinned(&written) && all_pinned(&read), "{:?} {:?}", places(&written), places(&read));
    assert_eq!(device(&daemon, 0).await.activity.unwrap().device_chunks, 0);
}

/// Who keeps a chunk's memory mapped could see the next tenant's bytes in it. The next tenant must get other memory.
#[tokio::test(flavor = "multi_thread")]
async fn memory_changes_tenant_by_being_replaced() {
    let folder = folder();
    let tables = "[[hbm]]\ndevice = \"host-only\"\nbytes = \"4MiB\"\n[[tenant]]\nname = \"default\"\n[[tenant]]\nname = \"other\"\n";
    let extra = "persist_delay_ms = 3600000\nwindow_idle_ms = 50\nwindow_recall_max_ms = 100\n";
    let daemon = Running::start(folder.path(), &format!("{extra}{tables}"));
    let names = keys(FRAMES);
    let mut old = Lane::on_device(folder.path(), 0).await;
    let (_window, written) = old.write(&names).await;
    assert!(all_on(&written, 0), "{written:?}");
    let (data, fences, bytes, _) = old.descriptors(written.blocks[0].chunk).await;
    let kept = map(data, fences, bytes, Access::Read).unwrap();
    old.release(written.lease).await;
    old.ask(Op::ReturnWindow(wire::ReturnWindow { chunk: written.blocks[0].chunk })).await.unwrap();
    let mut new = Lane::open_as(&socket(folder.path()), "other", "").await;
    new.want = Some(0);
    let began = std::time::Instant::now();
    let others = loop {
        let leased = new.lease_within(LeaseKind::Write, &names[..1], 1000).await;
        if leased.blocks[0].tier() == Tier::Hbm {
            break leased;
        }
        new.release(leased.lease).await;
        assert!(began.elapsed() < crate::common::PATIENCE, "the device is not given to the other tenant");
        tokio::time::sleep(Duration::from_millis(50)).await;
    };
    let (data, fences, bytes, _) = new.descriptors(others.blocks[0].chunk).await;
    let theirs = map(data, fences, bytes, Access::Write).unwrap();
    crate::common::lane::store(&theirs, 0, &vec![0xEE; usize::try_from(bytes).unwrap()]);
    let grant = &written.blocks[0];
    let mut seen = vec![0; usize::try_from(grant.length).unwrap()];
    kept.view(grant.offset, terrace_core::ByteCount::new(grant.length)).unwrap().copy_to(&mut seen);
    assert!(seen == crate::common::payload(names[0], 0), "the old mapping shows the new tenant's bytes");
    assert!(
        kept.fence(grant.frame).map(terrace_core::Fence::get) > Some(grant.fence),
        "its fence did not move"
    );
    drop(daemon);
}
