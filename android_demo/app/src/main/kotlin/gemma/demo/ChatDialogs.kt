package gemma.demo

import android.app.AlertDialog
import android.widget.EditText
import gemma.core.EXAMPLE_TOOLS
import gemma.core.SavedChat
import gemma.core.Tools

/** Choosing and deleting chats, and what their answers may call. */
internal class ChatDialogs(private val screen: ChatActivity) {
    private val application get() = screen.applicationContext as GemmaApplication

    fun chooseChat() {
        val chats = application.chats.all()
        val damaged = application.chats.damaged()
        val titles = chats.map { it.title } + damaged.map { "damaged: $it" }
        val builder = AlertDialog.Builder(screen).setTitle("Chats")
            .setItems(titles.toTypedArray<CharSequence>()) { _, index -> if (index < chats.size) chatActions(chats[index]) else delete(damaged[index - chats.size]) }
        screen.show(if (titles.isEmpty()) builder.setMessage("No chat was saved yet.") else builder)
    }

    private fun chatActions(chat: SavedChat) = screen.show(
        AlertDialog.Builder(screen).setTitle(chat.title).setMessage("${chat.messages.size} turns, ${chat.bundle}")
            .setPositiveButton("Open") { _, _ -> screen.launchTask { screen.open(chat) } }
            .setNegativeButton("Delete") { _, _ -> delete(chat.id) },
    )

    private fun delete(id: String) = screen.launchTask {
        application.chats.delete(id)
        if (id == application.chat.id) screen.open(application.newChat())
    }

    /** Lets the user enter the tools of this chat as JSON, or none. */
    fun editTools() {
        val text = EditText(screen).apply { setText(application.chat.settings.tools.ifBlank { EXAMPLE_TOOLS }) }
        val builder = AlertDialog.Builder(screen).setTitle("Tools that the model may call")
            .setMessage("Nothing is run: you are asked for the result of each call. The app answers current_time itself.")
            .setNegativeButton("No tools") { _, _ -> use("") }
        screen.show(
            checkedDialog(builder, form(screen, labelled("JSON schemas", text)), "Use") {
                val tools = Tools.parse(text.text.toString())
                application.model?.codec?.check(tools)
                use(if (tools.isEmpty) "" else text.text.toString())
            },
        )
    }

    private fun use(tools: String) = screen.launchTask {
        application.keep(application.chat.copy(settings = application.chat.settings.copy(tools = tools)))
    }
}
