import Foundation

#if os(iOS)
import Darwin
import os

/// The app's memory as the system counts it against the app's limit, and the memory that it may still use.
func memoryLine() -> String {
    String(format: "app %.0f MB · free %.0f MB", Double(footprintBytes()) / 1e6, Double(os_proc_available_memory()) / 1e6)
}

private func footprintBytes() -> UInt64 {
    var info = task_vm_info_data_t()
    var count = mach_msg_type_number_t(MemoryLayout<task_vm_info_data_t>.size / MemoryLayout<integer_t>.size)
    let status = withUnsafeMutablePointer(to: &info) { pointer in
        pointer.withMemoryRebound(to: integer_t.self, capacity: Int(count)) {
            task_info(mach_task_self_, task_flavor_t(TASK_VM_INFO), $0, &count)
        }
    }
    return status == KERN_SUCCESS ? info.phys_footprint : 0
}
#else
import GemmaKit

/// The peak memory of the process.
func memoryLine() -> String { String(format: "app %.0f MB", peakResidentBytes() / 1e6) }
#endif
