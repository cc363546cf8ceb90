package gemma.demo

import android.app.Application
import android.content.Context
import android.os.Handler
import android.os.Looper
import gemma.core.BundleLibrary
import gemma.core.ChatSettings
import gemma.core.CheckedBundles
import gemma.core.SavedChat
import gemma.core.SavedChats
import gemma.core.StorageException
import kotlinx.coroutines.CoroutineDispatcher
import kotlinx.coroutines.CoroutineScope
import kotlinx.coroutines.Runnable
import kotlinx.coroutines.asCoroutineDispatcher
import kotlinx.coroutines.launch
import java.io.File
import java.util.UUID
import java.util.concurrent.Executors
import kotlin.coroutines.CoroutineContext

/** Holds what outlives the screens: the model, the only thread that may use it, and the chat, which outlives the process too. */
class GemmaApplication : Application() {
    val modelThread: CoroutineDispatcher =
        Executors.newSingleThreadExecutor { Thread(it, "model") }.asCoroutineDispatcher()

    val device by lazy { Device(this) }

    /** The folder for bundles, also for `adb push`: the app's own on shared storage, which needs no permission. */
    val bundleFolder: File by lazy { File(getExternalFilesDir(null) ?: filesDir, "bundles") }

    val library by lazy { BundleLibrary(bundleFolder) }
    val checked by lazy { CheckedBundles(File(filesDir, "checked.json")) }
    val chats by lazy { SavedChats(File(filesDir, "chats")) }
    private val preferences by lazy { getSharedPreferences("state", MODE_PRIVATE) }

    /** Written on the model thread; other threads may check whether it is null. */
    @Volatile
    var model: LoadedModel? = null

    /** The chosen bundle; null if none was chosen or it is gone. Main thread. */
    var bundle: File?
        get() = preferences.getString("bundle", null)?.let { name -> library.bundles().firstOrNull { it.name == name } }
        set(value) = preferences.edit().putString("bundle", value?.name).apply()

    /** The chosen number of threads, from the next time that a bundle is loaded; null for the usual one. Main thread. */
    var threads: Int?
        get() = preferences.getInt("threads", 0).takeIf { it > 0 }
        set(value) = preferences.edit().putInt("threads", value ?: 0).apply()

    private var current: SavedChat? = null

    /** The chat on the screen, the same after the process has ended. Main thread. */
    val chat: SavedChat get() = current ?: (lastChat() ?: newChat()).also { current = it }

    override fun attachBaseContext(base: Context) {
        super.attachBaseContext(base)
        disableTelemetry()
    }

    /** Begins with the settings of the last chat on the screen. */
    fun newChat() = SavedChat(UUID.randomUUID().toString(), bundle?.name.orEmpty(), current?.settings ?: lastSettings())

    /** Makes this the chat on the screen, and saves it. Throws StorageException. */
    fun keep(chat: SavedChat) {
        current = chat
        preferences.edit().putString("chat", chat.id).putString("settings", chat.settings.write()).apply()
        chats.save(chat)
    }

    /** Frees the model; call it on the model thread. */
    fun unload() {
        model?.close()
        model = null
    }

    /** Frees the model when memory is low, even if the screen that received the warning is gone. */
    fun unloadSoon() {
        CoroutineScope(modelThread).launch { unload() }
    }

    private fun lastSettings() = preferences.getString("settings", null)?.let(ChatSettings::parse) ?: ChatSettings()

    private fun lastChat(): SavedChat? = preferences.getString("chat", null)?.let { id ->
        try {
            chats.load(id)
        } catch (_: StorageException) {
            null // the list of chats names a damaged one
        }
    }
}

/** Runs coroutines on the main thread. */
object MainThread : CoroutineDispatcher() {
    private val handler = Handler(Looper.getMainLooper())

    override fun dispatch(context: CoroutineContext, block: Runnable) {
        handler.post(block)
    }
}
